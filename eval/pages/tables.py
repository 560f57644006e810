"""A comparison's cells, and its table as Markdown, LaTeX, CSV, and for the terminal."""

from salun_diffusion import tables

from ..measures import Column, columns, measure_of

COST = {  # what an erasure took, whatever measured it
    "seconds": Column(
        "mask + training, s", "", "wall time of the mask and the training, without drawing the training pictures"
    ),
    "megabytes": Column("file, MB", "", "size of the erasure's file"),
}


def all_columns() -> dict[str, Column]:
    """Every column by key, in the order of tables."""
    return columns() | COST


def scores(run: dict, model: dict) -> dict[str, tuple[str, object]]:
    """Column key → (heading, score) of one model in one ``results.json``. A key may name a variant after a colon."""
    values = dict(measure_of(run["format"]).scores(model))
    erasure, known = model["erasure"] or {}, all_columns()
    if erasure.get("seconds") is not None:
        values["seconds"] = erasure["seconds"]
    if erasure.get("bytes") is not None:
        values["megabytes"] = round(erasure["bytes"] / 1e6, 2)
    headings = {key: known[key.partition(":")[0]].heading(key.partition(":")[2]) for key in values}
    return {key: (headings[key], score) for key, score in values.items() if score is not None}


def numbers(score) -> tuple[float, float | None, float | None]:
    """``(value, low, high)`` of a score as a command wrote it."""
    if isinstance(score, dict):
        return score.get("percent", score.get("mean")), score["low"], score["high"]
    return score, None, None


def text(score, dash: str = "–") -> str:
    """A score for people: with its interval where it has one."""
    if score is None:
        return dash
    value, low, high = numbers(score)
    shown = f"{value:.1f}" if isinstance(value, float) else str(value)
    return shown if low is None else f"{shown} ({low:.1f}{dash}{high:.1f})"


def cells(line, columns: dict[str, str]) -> list[dict]:
    """For the page: value and interval of each cell as text, and the share to draw as a bar where it is one."""
    found = []
    for key in columns:
        score = line.scores.get(key)
        value, _, interval = text(score).partition(" ")
        share = score if isinstance(score, dict) and "percent" in score else None
        found.append({"value": value, "interval": interval.strip("()"), "share": share})
    return found


def _rows(lines: list, columns: dict[str, str], dash: str = "–") -> list[list[str]]:
    several = any(line.concept for line in lines)
    rows = [[*(["erased"] if several else []), "model", *columns.values()]]
    for line in lines:
        name = [line.concept["name"] if line.concept else ""] if several else []
        rows.append([*name, line.title, *(text(line.scores.get(key), dash) for key in columns)])
    return rows


def markdown(lines: list, columns: dict[str, str]) -> str:
    """The table for a document."""
    return tables.markdown(_rows(lines, columns))


def terminal(lines: list, columns: dict[str, str]) -> str:
    """The table for the terminal."""
    return tables.aligned(_rows(lines, columns, "-"))


def latex(lines: list, columns: dict[str, str], notes: str) -> str:
    """As :func:`salun_diffusion.tables.latex`, the best value of no column marked: intervals decide that."""
    return tables.latex(_rows(lines, columns), notes)


def flat(lines: list, columns: dict[str, str]) -> list[list]:
    """The rows of the CSV file: value, low and high of each score in columns of their own."""
    head = ["concept", "model", "name", "digest"]
    for key in columns:
        head += [key, f"{key}_low", f"{key}_high", f"{key}_n"]
    rows = [head]
    for line in lines:
        row = [line.concept["name"] if line.concept else "", line.title, line.model["name"], line.model["digest"]]
        for key in columns:
            score = line.scores.get(key)
            count = score.get("n") if isinstance(score, dict) else None
            row += [*(numbers(score) if score is not None else (None, None, None)), count]
        rows.append(row)
    used = [i for i in range(len(head)) if any(row[i] is not None for row in rows[1:])]
    return [[row[i] for i in used] for row in rows]


def notes(runs: list[dict]) -> str:
    """What the numbers mean and how they were measured, in a few sentences."""
    told = ["Intervals: 95%."]
    for run in {run["format"]: run for run in runs}.values():
        settings, versions = run["settings"], run["versions"]
        images = " and ".join(
            f"{settings[key]} {what}"
            for key, what in (
                ("num_forget_images", "pictures of the concept"), ("num_retain_images", "of all else"),
                ("num_images", "pictures for each task"), ("num_prompts", "prompts attacked"),
            )
            if key in settings
        )  # fmt: skip
        parts = [images or f"{run['n']} pictures"]
        if "num_inference_steps" in settings:
            guidance = settings["guidance_scale"]
            guidance = guidance if isinstance(guidance, str) else f"{guidance:g}"
            parts.append(f"{settings['scheduler']}, {settings['num_inference_steps']} steps, guidance {guidance}")
        if "seed" in settings:
            parts.append(f"seed {settings['seed']}")
        parts.append(f"torch {versions['torch']}, diffusers {versions['diffusers']}")
        told.append(f"`{run['protocol'].split(':')[0]}`: {', '.join(parts)}.")
    return " ".join(told)
