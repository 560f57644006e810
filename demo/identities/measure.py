"""How well the model draws its people, and what an erasure of some changes: pictures are read by the judge."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import ResNetForImageClassification

from salun_diffusion import list_erasures, load_erasure
from salun_diffusion.concepts.concept import Row
from salun_diffusion.files import read_json
from salun_diffusion.models import load_model
from salun_diffusion.tables import aligned

from . import judge


def told(folder: Path, run: str | None, pictures: int) -> str:
    """A table for people: with the erasure ``run``, of whom it forgets (U) and the others (R), before and after.

    ISM is the mean cosine of the vector that the judge reads from a picture to the person's mean vector; Acc the share
    of pictures of which that person is the nearest; SRK = Acc of R / (Acc of U + 0.01).

    Args:
        folder: of the model.
        run: an erasure, or none.
        pictures: of each person.

    Raises:
        SalunError: an erasure that cannot be loaded.
    """
    model = load_model(str(folder))
    names = list(model.people)
    before = scores(model, folder, pictures)
    if run is None:
        return aligned([["", "ISM", "Acc"], ["everybody", *(f"{part.mean():.3f}" for part in before)]])
    load_erasure(model.pipe, run)
    found = {list_erasures(model.pipe)[0]["concept"]: scores(model, folder, pictures)}
    lines = [["", "ISM of U", "ISM of R", "Acc of U", "Acc of R", "SRK"]]
    for concept, after in found.items():
        gone = torch.tensor([name in concept.split(", ") for name in names])
        for title, (cosine, right) in (("before", before), (f"without {concept}", after)):
            lost, kept = (float(right[mask].mean()) for mask in (gone, ~gone))
            cells = [float(cosine[gone].mean()), float(cosine[~gone].mean()), lost, kept, kept / (lost + 0.01)]
            lines.append([title, *(f"{cell:.3f}" for cell in cells)])
    return aligned(lines)


def scores(model, folder: Path, pictures: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each person the mean cosine of pictures to their mean vector, and the share that is nearest to it."""
    settings = read_json(folder / "concepts.json")["settings"]["person"]
    names, seen = list(model.people), ResNetForImageClassification.from_pretrained(folder / "judge").float().eval()
    centroids = torch.stack([model.centroid(name) for name in names])
    rows = [Row(name, None, {}, 1000 * pictures + i) for name in names for i in range(pictures)]
    how = {key: settings[key] for key in ("num_inference_steps", "guidance_scale")}
    drawn = model.draw(rows, batch_size=100, output_type="np", progress="drawing", **how)
    found = judge.read(seen, torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() * 2 - 1, centroids)
    own = centroids.repeat_interleave(pictures, 0)
    right = (found @ centroids.T).argmax(1) == torch.arange(len(names)).repeat_interleave(pictures)
    return F.cosine_similarity(found, own).view(-1, pictures).mean(1), right.float().view(-1, pictures).mean(1)
