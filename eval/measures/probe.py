"""Probing without drawing: by how much the erased network's activations differ from the base's, layer by layer.

[rebuild] The idea is Gaussian probing's, of which neither code nor layers, times and numbers are published: the network
is given Gaussian noise in place of noised pictures. What is counted, and how, is ours. Nothing is drawn and nothing is
judged, so that it takes seconds, and needs no classifier that knows the concept.

``results.json`` (``format`` "salun-diffusion probe 1"; what it shares with others is in :mod:`eval.results`) adds
``concept`` as :mod:`eval.judges.labelled` has it, ``conditions`` (condition → its prompts: "concept", "neighbours",
"nothing"), ``layers`` (their names, in the order of the data), and to each erasure ``change``: condition → ``layers``
(the mean change of each, in percent) and ``mean`` (of all, with its 95% interval over the probes). The base has none.
There is no samples.jsonl.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from salun_diffusion.concepts.finding import TYPES
from salun_diffusion.errors import SalunError
from salun_diffusion.options import option
from salun_diffusion.tables import aligned

from .. import options
from . import Column

if TYPE_CHECKING:
    import torch

    from salun_diffusion.concepts.concept import Concept
    from salun_diffusion.models.base import Model

NAME = "probe"
SUMMARY = "how much the erasure changes inside the network, for the concept and for all else, without drawing"
DESCRIPTION = """\
Give the base model and each erasure the same Gaussian noise with prompts of the concept, of its neighbours, and with
the empty prompt, and compare what comes out of each attention block: ‖erased − base‖ / ‖base‖. An erasure that is
aimed at the concept changes it much and the others little. A small change never proves that nothing was erased, nor a
large one that anything was: that is for `accuracy`, `relearn` and the attacks. It is ours, after Gaussian probing's
idea."""
FORMAT = "salun-diffusion probe 1"
TITLE = "change for {}, %"
COLUMNS = {
    "probe_concept": Column(
        TITLE.format("concept"), "",
        "by how much the attention blocks' output on Gaussian noise differs from the base model's where a prompt asks "
        "for the concept: ‖erased − base‖ / ‖base‖, the mean over blocks and probes; more is not better by itself",
    ),
    "probe_neighbours": Column(
        TITLE.format("neighbours"), "↓", "the same where it asks for the words that the text encoder has nearest to it"
    ),
    "probe_nothing": Column(TITLE.format("nothing"), "↓", "the same for the empty prompt"),
}  # fmt: skip
CONDITIONS = ("concept", "neighbours", "nothing")
BLOCK = re.compile(r"\b(attentions|transformer_blocks|single_transformer_blocks)\.\d+$")


@dataclass
class Options(options.Erasures, options.Output):
    """What is compared, on how many probes."""

    concept: list[str] = option(None, "what was erased, as given to erase_concept.py", metavar="NAME", required=True)
    concept_type: list[str] | None = option(
        None, "what a word of your own names, where erase_concept.py was told", tuple(TYPES)
    )
    num_neighbours: int = option(4, "other words that count as the concept's neighbours", metavar="N", least=1)
    num_prompts: int = option(4, "prompts of each word", metavar="N", least=1)
    num_probes: int = option(8, "noises, each with every prompt at every timestep", metavar="N", least=1)
    timesteps: list[int] = option(
        [100, 300, 500, 700, 900], "of the training schedule, 0 to 999 for most models", several=True, metavar="T",
        least=0,
    )  # fmt: skip
    seed: int = option(0, "fixes the prompts and the noises", metavar="N")


def run(options: Options) -> dict:
    """Compare each erasure with the base model, write ``output_dir``'s results, print a table, return the results.

    Raises:
        SalunError: an unusable base, concept or erasure, or a timestep that the schedule has not.
    """
    import copy
    from pathlib import Path

    from salun_diffusion.concepts.finding import find_concepts
    from salun_diffusion.files import write_json
    from salun_diffusion.models import load_model
    from salun_diffusion.models.load import resolve
    from salun_diffusion.process import place
    from salun_diffusion.run import DTYPES

    from .. import results, subjects

    base, state = options.pretrained_model_name_or_path, place()
    where, commit = resolve(base, options.revision)
    concept, *more = find_concepts(options.concept, Path(where) if commit is None else None, None, options.concept_type)
    if more:
        raise SalunError("probe takes one --concept: measure each by itself.")
    model = load_model(base, commit, DTYPES[options.dtype], options.variant)
    model.pipe.to(state.device)
    steps = model.schedule.config.num_train_timesteps
    if wrong := [t for t in options.timesteps if t >= steps]:
        raise SalunError(f"--timesteps {wrong[0]} is not in the model's schedule: give numbers from 0 to {steps - 1}.")
    before = copy.copy(model)
    before.network = copy.deepcopy(model.network).eval()  # so that both run on the same probe, one after the other
    models = subjects.introduce(model, base, options.erasure, options.scale)
    prompts = conditions(model, concept, options)
    for entry in models[1:]:
        with subjects.applied(model.pipe, entry):
            entry["change"] = {
                name: told(
                    changes(before, model, texts, options.timesteps, options.num_probes, options.seed, entry["name"])
                )
                for name, texts in prompts.items()
            }
    found = {
        "format": FORMAT,
        "protocol": f"probe/1 (ours): {options.num_probes} Gaussian noises at timesteps "
        f"{', '.join(map(str, options.timesteps))} with each prompt; ‖erased − base‖ / ‖base‖ of what each attention "
        "block puts out, its mean in percent over probes and blocks, 95% interval over probes",
        "n": options.num_probes * len(options.timesteps) * sum(map(len, prompts.values())),
        "concept": {"name": concept.name, "slot": concept.slot, "value": concept.label, "anchor": concept.anchor},
        "base": {"source": base, "revision": commit},
        "conditions": prompts,
        "layers": list(blocks(model.network)),
        "settings": {
            "num_probes": options.num_probes, "timesteps": options.timesteps, "num_neighbours": options.num_neighbours,
            "num_prompts": options.num_prompts, "seed": options.seed,
            "dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device),
        },
        "versions": results.VERSIONS,
        "models": models,
    }  # fmt: skip
    if state.is_main_process:
        results.begin(options.output_dir, FORMAT)
        write_json(options.output_dir / results.RESULTS, found)
        print(table(found))
    return found


def scores(model: dict) -> dict:
    """Column → score of a model of the results; of the base, none."""
    return {f"probe_{name}": change["mean"] for name, change in model.get("change", {}).items()}


def conditions(model: "Model", concept: "Concept", options: Options) -> dict[str, list[str]]:
    """Condition → its prompts. A neighbour's are the concept's own, with its word in the concept's place."""
    from dataclasses import replace

    words = [word for word in concept.vocabulary.slots[concept.slot] if word and word not in concept.names]
    near = nearest(model, concept.value, words)[: options.num_neighbours]
    count, seed = options.num_prompts, options.seed
    neighbours = [row.anchor_prompt for word in near
                  for row in replace(concept, anchor=word).forget_rows(count, seed, "probe")]  # fmt: skip
    asked = [row.prompt for row in concept.forget_rows(count, seed, "probe")]
    found = dict(zip(CONDITIONS, (asked, neighbours, [""]), strict=True))
    return {name: list(dict.fromkeys(prompts)) for name, prompts in found.items() if prompts}


def nearest(model: "Model", word: str, others: list[str]) -> list[str]:
    """``others`` by the cosine of their condition, all tokens of it, with that of ``word``; the nearest first."""
    import torch

    parts = model.encode([word, *others]).values()
    flat = torch.cat([part.flatten(1).float() for part in parts], dim=1)
    cosines = torch.nn.functional.cosine_similarity(flat[:1], flat[1:])
    return [others[i] for i in cosines.argsort(descending=True, stable=True).tolist()]


def blocks(network: "torch.nn.Module") -> dict[str, "torch.nn.Module"]:
    """The attention blocks by name, in the order of the data; of nested ones the outermost."""
    found: dict[str, torch.nn.Module] = {}
    for name, module in network.named_modules():
        if BLOCK.search(name) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    flow = {"down": 0, "mid": 1, "up": 2}
    return dict(sorted(found.items(), key=lambda item: flow.get(item[0].split("_")[0], 3)))  # stable within each


@contextmanager
def recording(network: "torch.nn.Module") -> Iterator[dict[str, "torch.Tensor"]]:
    """Within it, each forward pass puts every block's output into the mapping, ``(batch, values)`` in fp32."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str):
        def hook(module, inputs, output):
            value = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
            seen[name] = value.detach().flatten(1).float()

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in blocks(network).items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def changes(
    before: "Model", after: "Model", prompts: list[str], timesteps: list[int], count: int, seed: int, title: str
) -> "torch.Tensor":
    """‖after − before‖ / ‖before‖, ``(probes, blocks)``: of ``count`` noises with each prompt at each timestep."""
    import torch

    from salun_diffusion.process import place, progress

    noise = torch.randn(count, *after.sample_shape, generator=torch.Generator().manual_seed(seed))
    condition = after.empty if prompts == [""] else after.encode(prompts)  # SDXL has zeros for "nothing"
    noise, found = noise.to(after.device, after.dtype), []
    pairs = [(t, i) for t in timesteps for i in range(len(prompts))]
    with torch.no_grad(), recording(before.network) as base, recording(after.network) as now:
        for t, i in progress(f"{title}: probing", len(pairs), "batch", place().is_main_process, over=pairs):
            one = after.repeated({key: value[i : i + 1] for key, value in condition.items()}, count)
            times = torch.full((count,), t, device=after.device)
            for model in (before, after):
                model.predict(noise, times, one)
            parts = [(now[name] - base[name]).norm(dim=1) / base[name].norm(dim=1) for name in base]
            found.append(torch.stack(parts, dim=1).cpu())
    return torch.cat(found)


def told(change: "torch.Tensor") -> dict:
    """``{"layers", "mean"}`` in percent, of ``change`` ``(probes, blocks)``."""
    layers, probes = (100 * change.double().mean(dim=dim) for dim in (0, 1))
    mean, n = probes.mean().item(), len(probes)
    error = 1.96 * probes.std().item() / n**0.5 if n > 1 else 0.0
    return {
        "layers": [round(value, 3) for value in layers.tolist()],
        "mean": {"mean": round(mean, 2), "low": round(mean - error, 2), "high": round(mean + error, 2), "n": n},
    }


def table(results: dict) -> str:
    """The means as aligned text, an erasure a line."""
    names = list(results["conditions"])
    lines = [["", *(TITLE.format(name) for name in names)]]
    for model in results["models"][1:]:
        means = [model["change"][name]["mean"] for name in names]
        lines.append([model["name"], *(f"{m['mean']:.1f} ({m['low']:.1f}-{m['high']:.1f})" for m in means)])
    return aligned(lines) + f"\n‖erased − base‖ / ‖base‖ over {len(results['layers'])} attention blocks."
