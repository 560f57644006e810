"""How well the model draws its people, and what an erasure of some changes: pictures are read by the judge."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import ResNetForImageClassification

from salun_diffusion import list_erasures, load_erasure, unload_erasure
from salun_diffusion.concepts.concept import Row
from salun_diffusion.files import read_json
from salun_diffusion.models import load_model

from . import judge


def table(folder: Path, runs: list[str], pictures: int) -> list[list[str]]:
    """Without ``runs`` everybody's mean; else for each of them whom it forgets (U) and the others (R), and above it the
    same before it.

    ISM is the mean cosine of the vector that the judge reads from a picture to the person's mean vector; Acc the share
    of pictures of which that person is the nearest; SRK = Acc of R / (Acc of U + 0.01).

    Args:
        folder: of the model.
        runs: erasures.
        pictures: of each person.

    Raises:
        SalunError: an erasure that cannot be loaded.
    """
    model = load_model(str(folder))
    base = scores(model, folder, pictures)
    if not runs:
        return [["", "ISM", "Acc"], ["everybody", *(f"{part.mean():.3f}" for part in base)]]
    rows = [["to forget", "erased by", "ISM of U", "ISM of R", "Acc of U", "Acc of R", "SRK"]]
    for run in runs:
        name = load_erasure(model.pipe, run)
        (made,) = list_erasures(model.pipe)
        gone = torch.tensor([person in made["concept"].split(", ") for person in model.people])
        for method, found in (("nothing", base), (made["method"], scores(model, folder, pictures))):
            parts = [float(part[mask].mean()) for part in found for mask in (gone, ~gone)]
            cells = [*parts, parts[3] / (parts[2] + 0.01)]
            rows.append([made["concept"], method, *(f"{cell:.3f}" for cell in cells)])
        unload_erasure(model.pipe, name)
    return rows


def scores(model, folder: Path, pictures: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each person the mean cosine of pictures to their mean vector, and the share that is nearest to it."""
    settings = read_json(folder / "concepts.json")["settings"]["person"]
    names, seen = list(model.people), ResNetForImageClassification.from_pretrained(folder / "judge").float().eval()
    scored = torch.stack([model.centroid(seen.config.id2label[i]) for i in range(len(names))])  # in the judge's order
    centroids = torch.stack([model.centroid(name) for name in names])
    rows = [Row(name, None, {}, 1000 * pictures + i) for name in names for i in range(pictures)]
    how = {key: settings[key] for key in ("num_inference_steps", "guidance_scale")}
    drawn = model.draw(rows, batch_size=100, output_type="np", progress="drawing", **how)
    found = judge.read(seen, torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() * 2 - 1, scored)
    own = centroids.repeat_interleave(pictures, 0)
    right = (found @ centroids.T).argmax(1) == torch.arange(len(names)).repeat_interleave(pictures)
    return F.cosine_similarity(found, own).view(-1, pictures).mean(1), right.float().view(-1, pictures).mean(1)
