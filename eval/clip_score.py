"""CLIP score: how well pictures fit their prompts, 100 · max(cos(picture, prompt), 0) (Hessel et al. 2021, without
their factor of 2.5, as the papers on erasure report it).

``results.json`` (``format`` "salun-diffusion clip-score 1"; what all have in common is in :mod:`eval.results`) adds
``clip`` (``source``, ``sha256`` of its weights), ``truncated`` (how many prompts are longer than it reads),
``pictures`` (the folder), and for each model ``clip_score``: ``mean``, ``low`` and ``high`` (its 95% interval, 1.96
standard errors) and ``n``. A line of ``samples.jsonl`` has ``clip_score``.
"""

import math
import statistics
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from tqdm import tqdm
from transformers import CLIPModel, CLIPProcessor
from transformers.utils import cached_file

from salun_diffusion.errors import SalunError
from salun_diffusion.files import sha256
from salun_diffusion.tables import aligned

from .results import VERSIONS, begin, picture, read_sets, write

FORMAT = "salun-diffusion clip-score 1"
DEFAULT = "openai/clip-vit-large-patch14"


def clip_score(pictures: Path, output_dir: Path, *, clip: str = DEFAULT, batch_size: int = 8) -> dict:
    """Score the pictures of every model in the results folder ``pictures``, write ``output_dir``'s files, print a
    table, return the results.

    Raises:
        SalunError: no results there, an unusable CLIP model, or a picture that is missing, unreadable, black or another
            than the one that was drawn (named, and no results are written).
    """
    transformers.utils.logging.disable_progress_bar()
    models, samples = read_sets(pictures)
    if any("prompt" not in line for lines in samples.values() for line in lines):
        raise SalunError(
            f"{pictures} does not say what its pictures were drawn from: give a folder that `python -m eval draw`, "
            "`i2p` or `accuracy` wrote results into."
        )
    device = PartialState().device
    scorer = _Scorer(clip, device)
    begin(output_dir, FORMAT)
    for model in models:
        lines = samples[model["name"]]
        with tqdm(total=len(lines), desc=f"{model['name']}: scoring", unit="image") as bar:
            for start in range(0, len(lines), batch_size):
                part = lines[start : start + batch_size]
                shown = [picture(pictures, line) for line in part]
                for line, score in zip(part, scorer(shown, [line["prompt"] for line in part]), strict=True):
                    line["clip_score"] = score
                bar.update(len(part))
        scores = [line["clip_score"] for line in lines]
        mean = statistics.fmean(scores)
        error = 1.96 * statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else math.inf
        low, high = (round(mean + side * error, 3) if error < math.inf else None for side in (-1, 1))
        model["clip_score"] = {"mean": round(mean, 3), "low": low, "high": high, "n": len(scores)}
    prompts = [line["prompt"] for line in samples[models[0]["name"]]]
    results = {
        "format": FORMAT,
        "protocol": f"clip-score/1: 100 max(cos, 0) of CLIP embeddings by {clip}; mean ± 1.96 standard errors",
        "n": len(prompts),
        "clip": {"source": clip, "sha256": scorer.sha256},
        "truncated": scorer.truncated(prompts),
        "pictures": str(pictures),
        "settings": {"batch_size": batch_size},
        "versions": VERSIONS,
        "models": models,
    }
    write(output_dir, results, [line for lines in samples.values() for line in lines])
    print(table(results))
    return results


class _Scorer:
    """A CLIP model that scores pictures against prompts.

    Raises:
        SalunError: it cannot be loaded from safetensors, or lacks weights (they would be random).
    """

    def __init__(self, source: str, device: torch.device):
        try:
            self.model, loading = CLIPModel.from_pretrained(
                source, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
            self.processor = CLIPProcessor.from_pretrained(source, backend="pil")  # whatever else is installed
            folder = Path(source)
            files = sorted(folder.glob("model*.safetensors")) if folder.is_dir() else []
            self.sha256 = sha256(*(files or [Path(cached_file(source, "model.safetensors"))]))
        except Exception as error:  # transformers has no common class for a missing file, an unfit one, or no network
            raise SalunError(
                f"{source} could not be loaded as a CLIP model ({str(error).strip().splitlines()[0]}): give a folder "
                "or hub id with safetensors weights by --clip."
            ) from None
        if loading["missing_keys"]:
            raise SalunError(f"{source} lacks weights of a CLIP model ({min(loading['missing_keys'])} …).")
        self.model.eval().to(device)

    @torch.no_grad()
    def __call__(self, pictures: list, prompts: list[str]) -> list[float]:
        inputs = self.processor(text=prompts, images=pictures, return_tensors="pt", padding=True, truncation=True)
        found = self.model(**inputs.to(self.model.device))
        cosines = torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds)
        if not torch.isfinite(cosines).all():
            raise SalunError("The CLIP model answers NaN or infinity, so nothing was measured: give another by --clip.")
        return [round(value, 4) for value in (100 * cosines.clamp(min=0)).tolist()]

    def truncated(self, prompts: list[str]) -> int:
        limit = self.processor.tokenizer.model_max_length
        return sum(len(ids) > limit for ids in self.processor.tokenizer(prompts).input_ids)


def table(results: dict) -> str:
    """Mean scores with their intervals as aligned text, a model a line."""
    lines = [["", "CLIP score", "95% interval", "n"]]
    for model in results["models"]:
        score = model["clip_score"]
        interval = f"{score['low']:.2f}-{score['high']:.2f}" if score["n"] > 1 else "-"
        lines.append([model["name"], f"{score['mean']:.2f}", interval, str(score["n"])])
    return aligned(lines)
