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
from salun_diffusion.stats import wilson

from . import judge


def measured(folder: Path, runs: list[str], pictures: int) -> dict:
    """What the model draws: ``everybody``, and in ``erasures`` for each of ``runs`` its ``concept`` and ``method``, and
    ``before`` and ``after`` it of whom it forgets (U) and of the others (R) ``ism_u``, ``ism_r``, ``acc_u``, ``acc_r``.

    ISM is the mean cosine of the vector that the judge reads from a picture to the person's mean vector; Acc the share
    of pictures of which that person is the nearest, with its Wilson 95% interval.

    Args:
        folder: of the model.
        runs: erasures.
        pictures: of each person.

    Raises:
        SalunError: an erasure that cannot be loaded.
    """
    model = load_model(str(folder))
    base, erasures = scores(model, folder, pictures), []
    everybody = torch.ones(len(model.people), dtype=torch.bool)
    for run in runs:
        name = load_erasure(model.pipe, run)
        (made,) = list_erasures(model.pipe)
        gone = torch.tensor([person in made["concept"].split(", ") for person in model.people])
        told = {"concept": made["concept"], "method": made["method"]}
        for when, found in (("before", base), ("after", scores(model, folder, pictures))):
            told[when] = share(found, gone, pictures, "_u") | share(found, ~gone, pictures, "_r")
        erasures.append(told)
        unload_erasure(model.pipe, name)
    return {"pictures": pictures, "people": len(model.people), "everybody": share(base, everybody, pictures),
            "erasures": erasures}  # fmt: skip


def share(found: tuple[torch.Tensor, torch.Tensor], who: torch.Tensor, pictures: int, of: str = "") -> dict:
    """ISM and Acc of some people, bool ``(people,)``, from :func:`scores`; their names end with ``of``."""
    count = round(float(found[1][who].sum()) * pictures)
    acc = wilson(count, int(who.sum()) * pictures)
    return {f"ism{of}": round(float(found[0][who].mean()), 4), f"acc{of}": acc}


def table(found: dict) -> list[list[str]]:
    """Rows for people, of what :func:`measured` gives: everybody's without erasures, else each before and after."""

    def shown(acc: dict) -> str:
        return f"{acc['percent']:.1f} ({acc['low']:.1f}-{acc['high']:.1f})"

    if not found["erasures"]:
        own = found["everybody"]
        return [["", "ISM", "Acc, %"], ["everybody", f"{own['ism']:.2f}", shown(own["acc"])]]
    rows = [["to forget", "erased by", "ISM of U", "ISM of R", "Acc of U, %", "Acc of R, %"]]
    for told in found["erasures"]:
        for method, cells in (("nothing", told["before"]), (told["method"], told["after"])):
            ism = [f"{cells[key]:.2f}" for key in ("ism_u", "ism_r")]
            rows.append([told["concept"], method, *ism, *(shown(cells[key]) for key in ("acc_u", "acc_r"))])
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
