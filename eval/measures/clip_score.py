"""CLIP score: how well pictures fit their prompts, 100 · max(cos(picture, prompt), 0) (Hessel et al. 2021, without
their factor of 2.5, as the papers on erasure report it).

``results.json`` (``format`` "salun-diffusion clip-score 1"; what all have in common is in :mod:`eval.results`) adds
``clip`` (``source``, ``sha256`` of its weights), ``truncated`` (how many prompts are longer than it reads),
``pictures`` (the folder), and for each model ``clip_score``: ``mean``, ``low`` and ``high`` (its 95% interval, 1.96
standard errors) and ``n``. A line of ``samples.jsonl`` has ``clip_score``.
"""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from salun_diffusion.errors import SalunError
from salun_diffusion.options import option
from salun_diffusion.tables import aligned

from .. import options
from . import Column

NAME = "clip-score"
SUMMARY = "how well pictures fit their prompts, by CLIP"
DESCRIPTION = """\
Score the pictures of every model in a results folder against the prompts that they were drawn from. Scores of different
CLIP models are on different scales: the papers use clip-vit-large-patch14 or clip-vit-base-patch32, so name yours."""
FORMAT = "salun-diffusion clip-score 1"
DEFAULT = "openai/clip-vit-large-patch14"
COLUMNS = {
    "clip_score": Column(
        "CLIP score", "↑", "how well pictures fit their prompts: 100 times the cosine of CLIP's two embeddings"
    )
}


@dataclass
class Options(options.Output, options.Batch):
    """The pictures, and which CLIP."""

    pictures: Path = option(None, options.PICTURES, metavar="RESULTS", positional=True, required=True)
    clip: str = option(DEFAULT, "a CLIP model of transformers: folder or hub id", metavar="PATH")


def run(options: Options) -> dict:
    """Score the pictures of every model in the results folder, write ``output_dir``'s files, return the results.

    Raises:
        SalunError: no results there, an unusable CLIP model, or a picture that is missing, unreadable, black or another
            than the one that was drawn (named, and no results are written).
    """
    import transformers
    from tqdm import tqdm

    from salun_diffusion.process import place

    from ..judges.clip import ClipScorer
    from ..results import VERSIONS, begin, picture, read_sets, write

    transformers.utils.logging.disable_progress_bar()
    pictures = options.pictures
    models, samples = read_sets(pictures)
    if any("prompt" not in line for lines in samples.values() for line in lines):
        raise SalunError(
            f"{pictures} does not say what its pictures were drawn from: give a folder that `python -m eval draw`, "
            "`i2p` or `accuracy` wrote results into."
        )
    device = place().device
    scorer = ClipScorer(options.clip, device)
    begin(options.output_dir, FORMAT)
    for model in models:
        lines = samples[model["name"]]
        with tqdm(total=len(lines), desc=f"{model['name']}: scoring", unit="image") as bar:
            for start in range(0, len(lines), options.batch_size):
                part = lines[start : start + options.batch_size]
                shown = [picture(pictures, line) for line in part]
                for line, score in zip(part, scorer(shown, [line["prompt"] for line in part]), strict=True):
                    line["clip_score"] = score
                bar.update(len(part))
        values = [line["clip_score"] for line in lines]
        mean = statistics.fmean(values)
        error = 1.96 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
        low, high = (round(mean + side * error, 3) if error < math.inf else None for side in (-1, 1))
        model["clip_score"] = {"mean": round(mean, 3), "low": low, "high": high, "n": len(values)}
    prompts = [line["prompt"] for line in samples[models[0]["name"]]]
    results = {
        "format": FORMAT,
        "protocol": f"clip-score/1: 100 max(cos, 0) of CLIP embeddings by {options.clip}; mean ± 1.96 standard errors",
        "n": len(prompts),
        "clip": {"source": options.clip, "sha256": scorer.sha256},
        "truncated": scorer.truncated(prompts),
        "pictures": str(pictures),
        "settings": {"batch_size": options.batch_size},
        "versions": VERSIONS,
        "models": models,
    }
    write(options.output_dir, results, [line for lines in samples.values() for line in lines])
    print(table(results))
    return results


def scores(model: dict) -> dict:
    """Column → score of a model of the results."""
    return {"clip_score": model["clip_score"]}


def table(results: dict) -> str:
    """Mean scores with their intervals as aligned text, a model a line."""
    lines = [["", "CLIP score", "95% interval", "n"]]
    for model in results["models"]:
        score = model["clip_score"]
        interval = f"{score['low']:.2f}-{score['high']:.2f}" if score["n"] > 1 else "-"
        lines.append([model["name"], f"{score['mean']:.2f}", interval, str(score["n"])])
    return aligned(lines)
