"""How a class-conditional model of digits is measured beside the one that never saw a digit."""

from pathlib import Path

from salun_diffusion.files import read_json

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "demo" / "digits" / "model"
SHOWN = 4  # pictures of the forgotten digit that are kept of each model


class Bench:
    """The base model, the judge and the real digits, and how a model is measured with them.

    Args:
        config: how many pictures, as ``python -m benchmarks.classwise`` has it.
        folder: of the base model; it says how models are drawn from.
    """

    def __init__(self, config, folder: Path = MODEL):
        import torch
        from sklearn.datasets import load_digits
        from transformers import AutoModelForImageClassification

        from salun_diffusion.models import load_model

        self.config, self.model = config, load_model(str(folder))
        settings = read_json(folder / "concepts.json")["settings"]["digit"]
        self.how = {key: settings[key] for key in ("num_inference_steps", "guidance_scale")}
        self.judge = AutoModelForImageClassification.from_pretrained(folder / "judge", dtype=torch.float32).eval()
        found = load_digits()
        self.real = torch.from_numpy(found.images).float().unsqueeze(1) / 8 - 1
        self.labels = torch.from_numpy(found.target)

    def seen(self, pictures):
        """What the judge names, int64 ``(n,)``, and the features that it names it by, ``(n, 64)``."""
        import torch
        import torch.nn.functional as F

        x = F.interpolate(pictures, 32, mode="bilinear").expand(-1, 3, -1, -1)  # as its processor does
        with torch.no_grad():
            features = self.judge.resnet(x).pooler_output.flatten(1)
            return self.judge.classifier(features[:, :, None, None]).argmax(1), features

    def drawn(self, model, digit: int, noise: int = 50_000):
        """Pictures of the forgotten digit and of the others, ``(n, 3, 8, 8)`` in −1…1, and what each should be; every
        model's noise is of the seeds from ``noise`` on.
        """
        import numpy as np
        import torch

        from salun_diffusion.concepts.concept import Row

        names = model.names
        wanted = [digit] * self.config.forget_pictures
        wanted += [one for one in range(len(names)) if one != digit for _ in range(self.config.kept_pictures)]
        rows = [Row(names[one], None, {}, noise + i) for i, one in enumerate(wanted)]
        drawn = np.stack(model.draw(rows, batch_size=125, output_type="np", **self.how))
        return torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2 - 1, torch.tensor(wanted)

    def measured(self, model, digit: int, retrain=None, noise: int = 50_000, shown: Path | None = None):
        """The scores of a model, and the judge's features of its kept digits.

        Args:
            model: a ``Labels`` of ``salun_diffusion.models``.
            digit: that it forgot.
            retrain: the features of Retrain's kept digits.
            noise: the first seed.
            shown: a PNG to write with some pictures of the forgotten digit beside each other.
        """
        import torch

        pictures, wanted = self.drawn(model, digit, noise)
        named, features = self.seen(pictures)
        forgotten = wanted == digit
        kept = features[~forgotten]
        real = self.seen(self.real[self.labels != digit])[1]
        scores = {
            "ua": 100 * (named[forgotten] != digit).float().mean().item(),
            "others": 100 * (named == wanted)[~forgotten].float().mean().item(),
            "frechet_real": frechet(kept, real),
            "frechet_retrain": None if retrain is None else frechet(kept, retrain),
            "drawn_as": torch.bincount(named[forgotten], minlength=len(model.names)).tolist(),
        }
        if shown:
            side_by_side(pictures[forgotten][:SHOWN], shown)
        return scores, kept


def side_by_side(pictures, path: Path) -> None:
    """Write ``pictures`` ``(n, 3, height, width)`` in −1…1 as one grey PNG, from left to right."""
    from PIL import Image

    row = ((pictures.mean(1).clamp(-1, 1) + 1) * 127.5).round().byte()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(row.permute(1, 0, 2).flatten(1).numpy()).save(path)


def frechet(one, two) -> float:
    """Fréchet distance between two sets of features, ``(n, d)`` each, n > d (Heusel et al. 2017, eq. 6)."""
    import numpy as np

    one, two = one.double().numpy(), two.double().numpy()
    cross = np.linalg.eigvals(np.cov(one.T) @ np.cov(two.T)).real.clip(min=0)  # of a product of two covariances: ≥ 0
    apart = np.square(one.mean(0) - two.mean(0)).sum()
    return float(apart + np.trace(np.cov(one.T)) + np.trace(np.cov(two.T)) - 2 * np.sqrt(cross).sum())
