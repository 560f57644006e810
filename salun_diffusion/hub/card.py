"""The model card of an erasure, from the files of its run and from what was measured."""

import re
from dataclasses import dataclass
from pathlib import Path

from .. import erasures
from ..erasures.locate import ADAPTER_NAME, locate
from ..errors import SalunError
from ..files import read_json
from ..guards import GUARDS
from .measured import Measured


@dataclass(frozen=True)
class About:
    """What a run's files say: ``base_id`` is the base model's id where it came from the hub, else None."""

    folder: Path
    file: Path
    digest: str
    weights: int
    network: str
    config: dict
    concept: str
    base_id: str | None
    base_revision: str | None


def read_run(folder: Path) -> About:
    """The run in ``folder``.

    Raises:
        SalunError: it is not finished, or damaged.
    """
    config = folder / "config.json"
    if not config.is_file():  # what a run writes last
        raise SalunError(f"{folder} holds no finished run (no config.json): give the folder of one.")
    file, _ = locate(folder)
    erasure = erasures.load(file)
    try:
        told = read_json(config)
        named = [str(told[key]) for key in ("concept", "method", "base_model")]
    except (OSError, ValueError, KeyError, TypeError):
        raise SalunError(f"{config} is damaged, or no run's config: give a finished run's folder.") from None
    commit = told.get("base_revision")
    is_id = commit and re.fullmatch(r"[\w.-]+/[\w.-]+", named[2])
    weights = erasure.describe()["weights"]
    network = "text encoder" if erasure.component == "text_encoder" else "denoiser"
    base = (named[2], commit) if is_id else (None, None)
    return About(folder, file, erasure.digest(), weights, network, told, named[0], *base)


def card(about: About, repo_id: str, measured: list[Measured], picture: str | None, license: str | None) -> str:
    """README.md: the metadata that the hub reads, then text for people.

    Args:
        about: the run.
        repo_id: where the card will be.
        measured: what was measured of it.
        picture: the name of the pictures' file beside it.
        license: as the hub spells it.
    """
    from huggingface_hub import ModelCard, ModelCardData

    name = repo_id.rpartition("/")[2]
    results = [result for one in measured for result in _results(one)]
    data = ModelCardData(
        base_model=about.base_id, base_model_relation="adapter" if about.base_id else None, library_name="diffusers",
        license=license, pipeline_tag="text-to-image", model_name=name if results else None,
        tags=["unlearning", "concept-erasure", "salun", "salun-diffusion", "stable-diffusion", "text-to-image"],
        eval_results=results or None,
    )  # fmt: skip
    parts = [_head(about), _loading(about, repo_id), _measured(measured, picture), _making(about), LIMITS,
             _licence(about, license)]  # fmt: skip
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, parts)) + "\n"))


def _results(one: Measured) -> list:
    """The scores as the hub's model-index has them; the interval, n and the base model's score are arguments."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-to-image", task_name="Concept erasure", dataset_type=f"salun-diffusion-{one.measure}",
            dataset_name=f"python -m eval {one.title}", dataset_config=one.title,  # by which the hub tells two apart
            metric_type=score.name.replace(" ", "_"), metric_name=_title(score.name), metric_value=score.value,
            metric_args={
                key: value for key, value in {
                    "low": score.low, "high": score.high, "n": score.n, "interval": "95%" if score.low is not None
                    else None, "base_model": score.base.value if score.base else None,
                }.items() if value is not None
            },
        )
        for score in one.scores
    ]  # fmt: skip


def _title(name: str) -> str:
    return " ".join(word.upper() if word in ("ua", "ira", "cra", "asr", "fid", "clip") else word
                    for word in name.split())  # fmt: skip


def _plain(text) -> str:
    """``text`` as one line that Markdown leaves alone."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(str(text).split()))


def _base(about: About) -> str:
    if about.base_id:
        return f"[{about.base_id}](https://huggingface.co/{about.base_id})"
    return f"`{Path(about.config['base_model']).name}`"  # a local one: its path is nobody's business


def _head(about: About) -> str:
    told, concept = about.config, _plain(about.concept)
    anchor = told.get("anchor")
    instead = f", and draws “{_plain(anchor)}” in its place" if anchor else ""
    if told["method"] in GUARDS:
        how = "It is a guard, which changes no weight but watches each step of the drawing"
    elif about.file.name == ADAPTER_NAME:
        how = f"It is a low-rank adapter of {about.weights:,} weights beside the denoiser's own"
    else:
        how = f"It changes {about.weights:,} weights of the {about.network} in place"
    return (
        f"# Forget: {concept}\n\n"
        f"A small file that makes {_base(about)} forget **{concept}**: with it, the model no longer draws that when a "
        f"prompt asks for it{instead}. {how} "
        f"({about.file.stat().st_size / 1e6:.2f} MB) and comes off again without a trace. Made by salun-diffusion "
        f"with the method `{told['method']}`."
    )


def _loading(about: About, repo_id: str) -> str:
    base = about.base_id or Path(about.config["base_model"]).name
    revision = f', revision="{about.base_revision}"' if about.base_revision else ""
    only = (
        "Other fine-tunes of the same shape are refused, since it was made for and measured on this one; "
        "`check_base=False` applies it all the same."
    )
    if about.config["method"] in GUARDS:
        only = "Other models of the same kind may wear it too, though nothing was measured on them."
        elsewhere = "It acts in diffusers' own pipelines alone."
    elif about.file.name == ADAPTER_NAME:
        elsewhere = f'It is a LoRA: `pipe.load_lora_weights("{repo_id}")` opens it too, and checks no base model.'
        if about.config.get("by_prompt"):
            elsewhere += (
                " There it acts at full strength on every prompt; `load_erasure` scales it by how near each prompt is "
                "to what it erases, which the scores below are of."
            )
    else:
        elsewhere = (
            "For ComfyUI, A1111 and others, fetch `erasure.safetensors` and write it in their formats by `python -m "
            "salun_diffusion export`."
        )
    return (
        "## Load it\n\nWith the Python package salun-diffusion:\n\n```python\nfrom diffusers import DiffusionPipeline\n"
        "from salun_diffusion import load_erasure, unload_erasure\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("{base}"{revision})\n'
        f'load_erasure(pipe, "{repo_id}")  # scale=0.8 applies 80% of it\n'
        "unload_erasure(pipe)  # the base model's own bits again\n```\n\n"
        f"{only} {elsewhere}"
    )


def _measured(measured: list[Measured], picture: str | None) -> str:
    if not measured:
        return "## Measured\n\nNothing was measured with this card: how much is forgotten and kept is not known."
    parts = ["## Measured\n\nBeside the base model itself, in percent where nothing else is said, with 95% intervals."]
    if any(score.name == "ua" for one in measured for score in one.scores):
        parts.append(MEANING)
    for one in measured:
        rows = [f"### {_plain(one.title)}", ""]
        rows += ["| score | base model | with the erasure | n |", "| --- | --- | --- | --- |"]
        rows += [f"| {_title(s.name)} | {s.base or '–'} | {s} | {s.n} |" for s in one.scores]
        parts.append("\n".join([*rows, "", f"Protocol: {_plain(one.protocol)}"]))
    if picture:
        parts.append(
            f"![The same prompts and starting noise, by the base model and with the erasure]({picture})\n\n"
            "The same prompts and starting noise by the base model (above) and with the erasure (below): first prompts "
            "that ask for it, then prompts for all else, evenly picked."
        )
    return "\n\n".join(parts)


def _making(about: About) -> str:
    told = about.config
    settings = told.get("settings") or {}
    rows = {
        "concept": told["concept"], "drawn in its place": told.get("anchor"), "method": told["method"],
        "layers": told.get("scope"), "share of their weights": told.get("density"),
        "base model's commit": about.base_revision, "base model's fingerprint": told.get("base_fingerprint"),
        "steps": settings.get("max_train_steps"), "learning rate": settings.get("learning_rate"),
        "seed": settings.get("seed"), "seconds": told.get("seconds"), "digest": about.digest,
        "versions": ", ".join(f"{name} {version}" for name, version in (told.get("versions") or {}).items()),
    }  # fmt: skip
    lines = [f"| {name} | {_plain(value)} |" for name, value in rows.items() if value not in (None, "")]
    return "\n".join(["## How it was made", "", "| | |", "| --- | --- |", *lines, "",
                      "All settings are in `config.json`."])  # fmt: skip


MEANING = """UA (unlearning accuracy): of the prompts that ask for it, the share that no longer shows it. IRA and CRA
(retained accuracy): of all other prompts, the share still drawn right in its own kind, and in the other one."""
LIMITS = """## Limits

- It is no guarantee. Whoever has the file can leave it off, and fine-tuning, a LoRA, textual inversion or searched-for
  prompts can bring a concept back. It is no substitute for a filter of what is drawn.
- The scores hold for the prompts, the sampler and the judge that they were measured with. Other words, languages and
  uses (image to image, ControlNet, other adapters) were not measured unless a table says so.
- What is near the forgotten concept may be drawn worse than before."""


def _licence(about: About, license: str | None) -> str:
    what = f"This card names `{license}`" if license else "This card names no licence"
    return f"## Licence\n\n{what}. The file is a change of {_base(about)}, whose own licence holds for what is drawn."
