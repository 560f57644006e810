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
    """Without ``runs`` everybody's mean; else for each of them whom it forgets (U) and the others (R), above it the
    same before it, and below all, if they do not forget the same, the means of each method.

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
    rows: list[tuple[str, str, list[float]]] = []
    for run in runs:
        name = load_erasure(model.pipe, run)
        (made,) = list_erasures(model.pipe)
        gone = torch.tensor([person in made["concept"].split(", ") for person in model.people])
        if made["concept"] not in [row[0] for row in rows]:
            rows.append((made["concept"], "nothing", summary(base, gone)))
        rows.append((made["concept"], made["method"], summary(scores(model, folder, pictures), gone)))
        unload_erasure(model.pipe, name)
    if len({row[0] for row in rows}) > 1:
        for method in dict.fromkeys(row[1] for row in rows):
            found = torch.tensor([row[2] for row in rows if row[1] == method])
            rows.append((f"mean of {len(found)}", method, found.mean(0).tolist()))
    head = ["to forget", "erased by", "ISM of U", "ISM of R", "Acc of U", "Acc of R", "SRK"]
    return [head, *([concept, method, *(f"{cell:.3f}" for cell in cells)] for concept, method, cells in rows)]


def summary(found: tuple[torch.Tensor, torch.Tensor], gone: torch.Tensor) -> list[float]:
    """ISM of U and R, Acc of U and R, and SRK, from :func:`scores`; ``gone`` says who is forgotten."""
    parts = [float(part[mask].mean()) for part in found for mask in (gone, ~gone)]
    return [*parts, parts[3] / (parts[2] + 0.01)]


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
