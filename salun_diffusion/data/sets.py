"""Forget and retain sets: pictures that the base model draws itself, or the user's own, kept as latents and encoded
prompts.

Nothing is encoded twice: the final latents of the pipeline are what the autoencoder would give back, and each distinct
prompt passes through the text encoder once. A set lives in a folder named by the hash of all that determines it (model,
prompts, seeds, steps, guidance; or the pictures), in small shards; a stopped run goes on with the missing ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from diffusers.utils import make_image_grid
from PIL import Image
from tqdm import tqdm

from ..concepts.concept import Concept, Row, shared_rows
from ..config import EraseConfig
from ..errors import SalunError
from ..files import make_folder, replacing
from ..models.base import Condition, Model
from ..models.load import digest, sampler
from .cache import Latents, cached

if TYPE_CHECKING:
    from .sources import Picture, Source


@dataclass
class ImageSet:
    """Latents ``(n, channels, height, width)`` in fp32, and for each the number of its prompt and of its anchor prompt.

    ``condition`` holds one row for each distinct prompt (``prompts`` order); ``shares`` says how many pictures are of
    the first concept, of the second, and so on; ``tokens``, for sets with anchors of models with text, which tokens of
    each picture's prompt are the "concept" and which the "end", bool ``(n, sequence)``.
    """

    latents: Latents | torch.Tensor
    prompts: list[str]
    prompt_index: torch.Tensor
    anchor_index: torch.Tensor | None
    condition: Condition
    shares: tuple[int, ...] = ()
    tokens: dict[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.latents)


def image_set(
    model: Model,
    concepts: list[Concept],
    kind: str,
    sources: "list[Source]",
    config: EraseConfig,
    accelerator: Accelerator,
) -> ImageSet:
    """A set of ``concepts``: from ``sources`` (for the forget set one for each concept), or drawn by ``pipe`` where
    there are none. What ``config.data_dir`` holds already is not made again. Processes share the work; each returns the
    whole set.

    Args:
        model: the base model.
        concepts: those that are forgotten together.
        sources: the user's pictures, or none.
        config: how many, how drawn, which seed and cache.
        accelerator: whose processes share the work.
        kind: "forget" (pictures of the concept), "retain", "anchor" (the forget set's prompts, with pictures of what
            the anchor's prompts draw) or "name" (for each name of a concept one prompt, as the user
            gave it; latents of zeros).

    Raises:
        SalunError: a picture that cannot be read, a source without any that fits, a damaged cache folder, a model that
            draws NaN, or fewer pictures than processes.
    """
    count = config.num_retain_images if kind == "retain" else config.num_forget_images
    if kind == "name":
        parts = [[Row(name, concept.anchor, {}, 0) for name in _bare_names(concept, model)] for concept in concepts]
        return _assembled(model, parts, torch.zeros(sum(map(len, parts)), *model.sample_shape))
    if not sources:
        wanted = "retain" if kind == "retain" else "forget"
        return drawn_set(
            model, shared_rows(concepts, wanted, count, config.seed, "training"), config, kind, accelerator
        )
    if kind == "retain":
        shards, prompts = _encoded(model, sources[0], kind, concepts, count, config, accelerator)
        rows = [Row(prompt, None, {}, 0) for prompt in prompts]
        return _assembled(model, [rows], _stored(shards, rows, kind, accelerator))
    parts, shards = [], []
    for concept, source in zip(concepts, sources, strict=True):
        found, prompts = _encoded(model, source, kind, [concept], count // len(concepts), config, accelerator)
        parts.append(concept.forget_rows(len(prompts), config.seed, "training"))
        shards += found
    return _assembled(model, parts, _stored(shards, sum(parts, []), kind, accelerator))


def _bare_names(concept: Concept, model: Model) -> tuple[str, ...]:
    """What a set of names is of: the concept as the user wrote it, or each of its names; for a model that reads no
    text, the name that it knows the class by.
    """
    return concept.names if concept.synonyms or "text" not in model.capabilities else (concept.name,)


def drawn_set(
    model: Model, parts: list[list[Row]], config: EraseConfig, kind: str, accelerator: Accelerator
) -> ImageSet:
    """Draw the rows of each concept with the base model.

    Raises:
        SalunError: as :func:`image_set`.
    """
    rows = sum(parts, [])
    shown = [replace(row, prompt=row.anchor_prompt) for row in rows] if kind == "anchor" else rows
    shards = _drawn(model, shown, config, kind, accelerator)
    return _assembled(model, parts, _stored(shards, rows, kind, accelerator))


def _stored(shards: list[Path], rows: list[Row], kind: str, accelerator: Accelerator) -> Latents:
    """The latents in ``shards``.

    Raises:
        SalunError: they are not one for each row, or fewer than processes.
    """
    if len(rows) < accelerator.num_processes:
        raise SalunError(
            f"The {kind} set has {len(rows)} pictures for {accelerator.num_processes} processes: give more pictures, "
            "or start fewer processes."
        )
    latents = Latents(shards)
    if len(latents) != len(rows):
        raise SalunError(
            f"{shards[0].parent} holds {len(latents)} latents where {len(rows)} belong: delete that folder."
        )
    return latents


def _assembled(model: Model, parts: list[list[Row]], latents: Latents | torch.Tensor) -> ImageSet:
    """The set of ``parts``' prompts with their ``latents``, in the same order."""
    rows = sum(parts, [])
    anchors = [row.anchor_prompt for row in rows if row.anchor_prompt is not None]
    prompts = list(dict.fromkeys([row.prompt for row in rows] + anchors))
    place = {prompt: i for i, prompt in enumerate(prompts)}
    condition = model.encode(prompts)
    return ImageSet(
        latents,
        prompts,
        torch.tensor([place[row.prompt] for row in rows]),
        torch.tensor([place[prompt] for prompt in anchors]) if anchors else None,
        condition,
        tuple(len(part) for part in parts),
        _tokens(model, rows, model.tokens(condition).shape[1])
        if anchors and "cross-attention" in model.capabilities
        else {},
    )


def _tokens(model: Model, rows: list[Row], length: int) -> dict[str, torch.Tensor]:
    """:attr:`ImageSet.tokens` for prompts of ``length`` tokens, padding included."""
    marked = {kind: torch.zeros(len(rows), length, dtype=torch.bool) for kind in ("concept", "end")}
    for i, row in enumerate(rows):
        marked["concept"][i, model.differing_tokens(row.prompt, row.anchor_prompt)] = True
        marked["end"][i, model.token_count(row.prompt) - 1 :] = True
    return marked


def _drawn(model: Model, rows: list[Row], config: EraseConfig, kind: str, accelerator: Accelerator) -> list[Path]:
    how = {"num_inference_steps": config.num_inference_steps, "guidance_scale": config.guidance_scale}
    settings = how | {
        "model": digest(model.pipe),
        "pipeline": type(model.pipe).__name__,
        **sampler(model.pipe),
        "dtype": str(model.pipe.dtype),
        "rows": [[row.prompt, row.seed] for row in rows],
    }

    def latents(part: list[Row], bar: tqdm) -> torch.Tensor:
        drawn = model.draw(part, batch_size=config.sample_batch_size, output_type="latent", bar=bar, **how)
        return torch.stack(drawn)

    title = f"drawing the {kind} set"
    return cached(config.data_dir, kind, settings, rows, len(rows), latents, accelerator, title)[0]


def _encoded(
    model: Model,
    source: "Source",
    kind: str,
    concepts: list[Concept],
    count: int,
    config: EraseConfig,
    accelerator: Accelerator,
) -> tuple[list[Path], list[str]]:
    """Up to ``count`` pictures of ``source`` in the sampler's scale: the mode of what the autoencoder says."""
    model.need(["pictures"], f"A set from {source.text}")
    side = model.picture_side
    settings = {
        "source": source.key,
        "concepts": [[concept.name, *concept.names] for concept in concepts],
        "count": count,
        "side": side,
        "vae": digest(model.pipe, "vae"),
    }
    pictures = source.forget(concepts[0]) if kind == "forget" else source.retain(concepts)

    def latents(part: "list[Picture]", bar: tqdm) -> torch.Tensor:
        samples = []
        for picture in part:
            samples.append(model.encode_pictures([picture.square(side)]))
            bar.update()
        return torch.cat(samples)

    title = f"encoding {source.text}"
    found = cached(config.data_dir, kind, settings, islice(pictures, count), count, latents, accelerator, title)
    if not found[0]:
        raise SalunError(f"{source.text} has no picture for the {kind} set.")
    return found


def batches(count: int, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches of exactly ``size`` indices below ``count``: shuffled passes, one after the other, so that any
    batch size fits any set.
    """
    left, epoch = torch.empty(0, dtype=torch.long), 0
    while True:
        while len(left) < size:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
            left, epoch = torch.cat([left, order]), epoch + 1
        yield left[:size]
        left = left[size:]


def contact_sheet(model: Model, latents: torch.Tensor, path: Path, columns: int = 8) -> None:
    """Write the pictures of ``latents`` as one PNG, for people to look at what the training sees, or makes."""
    pictures = model.decode(latents)
    rows = -(-len(pictures) // columns)
    empty = Image.new("RGB", pictures[0].size, "white")
    make_folder(path.parent)
    with replacing(path) as file:
        make_image_grid(pictures + [empty] * (rows * columns - len(pictures)), rows, columns).save(file, "PNG")
