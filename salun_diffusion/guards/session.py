"""Guards on a live pipeline: hooks on its denoiser, two of its methods wrapped to know when a call of it draws, and the
step of its scheduler wrapped to move the latents that it starts from.

diffusers' own call does all the rest. It asks ``encode_prompt`` for embeddings, opens ``progress_bar`` around its steps
and calls the denoiser at each of them; where it guides, the rows of the negative prompts come before the prompts'.
"""

import inspect
import threading
import weakref
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch

from ..errors import SalunError
from ..files import listed
from ..models.load import denoiser
from ..models.text_unet import encode_empty
from .base import Call, Guard, Step, Watch, attention_blocks

WRAPPED = ("encode_prompt", "progress_bar")
PER_PICTURE = (  # what a U-Net is given that has one row for each picture
    "sample", "timestep", "encoder_hidden_states", "class_labels", "timestep_cond", "added_cond_kwargs",
    "encoder_attention_mask", "down_block_additional_residuals", "mid_block_additional_residual",
)  # fmt: skip
ELSEWHERE = (
    "The erasure {} acts in a call of the very pipeline that it was loaded on, and something else asks its denoiser: "
    "draw with that pipeline, or unload_erasure(pipe) first."
)


class Session:
    """The guards that one pipeline wears.

    Args:
        pipe: the diffusers pipeline, which is not kept alive by it.
    """

    def __init__(self, pipe):
        self.worn: dict[str, tuple[tuple[str, float, Guard], ...]] = {}  # by kind: name, scale, guard
        self.pipe, self.here = weakref.ref(pipe), threading.local()  # threads may draw at the same time
        module = denoiser(pipe)
        self.hooks = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after),
        ]
        for number, block in enumerate(module.up_blocks[:2]):
            self.hooks.append(block.register_forward_pre_hook(partial(self._before_block, number), with_kwargs=True))
        for name, block in attention_blocks(pipe).items():
            self.hooks.append(block.register_forward_hook(partial(self._after_attention, name)))
        self.found = {name: vars(pipe)[name] for name in WRAPPED if name in vars(pipe)}
        self.put = {
            "encode_prompt": self._encoding(pipe.encode_prompt),
            "progress_bar": self._drawing(pipe.progress_bar),
        }
        for name, method in self.put.items():
            setattr(pipe, name, method)
        self.schedulers: list[Any] = []  # whose step is wrapped: a pipeline may get another one on its way

    @property
    def guards(self) -> tuple[tuple[str, float, Guard], ...]:
        """All that is worn, of whatever kind."""
        return tuple(one for part in self.worn.values() for one in part)

    def close(self) -> None:
        """Take the hooks off, and give the pipeline and its schedulers their own methods back."""
        for hook in self.hooks:
            hook.remove()
        pipe = self.pipe()
        for name in WRAPPED if pipe is not None else ():
            delattr(pipe, name)
            if name in self.found:
                setattr(pipe, name, self.found[name])
        for scheduler in self.schedulers:
            del scheduler.step

    def intact(self) -> bool:
        """Whether the pipeline still draws under these guards."""
        pipe = self.pipe()
        hooked = all(hook.id in (hook.hooks_dict_ref() or ()) for hook in self.hooks)
        return hooked and (pipe is None or all(vars(pipe).get(name) is put for name, put in self.put.items()))

    def _encoding(self, method):
        """``encode_prompt`` that remembers what it was asked for."""

        @wraps(method)
        def encode_prompt(*args, **kwargs):
            found = method(*args, **kwargs)
            given = inspect.signature(method).bind(*args, **kwargs).arguments
            prompts = given.get("prompt")
            prompts = [prompts] if isinstance(prompts, str) else prompts
            count = given.get("num_images_per_prompt", 1)
            negative = given.get("negative_prompt") or ""
            each = len(found[0]) // count
            negative = [negative] * each if isinstance(negative, str) else negative
            prompts, negative = (
                None if texts is None else [text for text in texts for _ in range(count)]
                for texts in (prompts, negative)
            )
            self.here.encoded = prompts, negative, found[0]
            return found

        return encode_prompt

    def _drawing(self, method):
        """``progress_bar`` within which the denoiser is guarded."""

        @wraps(method)
        @contextmanager
        def progress_bar(*args, **kwargs):
            with method(*args, **kwargs) as bar:
                if getattr(self.here, "encoded", None) is None:
                    raise SalunError(ELSEWHERE.format(self._names()))
                call = Call(self.pipe(), *self.here.encoded, bar.total)
                self._wrap_step(call.pipe.scheduler)
                self.here.drawing = Drawing(call, [(scale, guard.watch(call)) for _, scale, guard in self.guards])
                try:
                    yield bar
                finally:
                    self.here.drawing = self.here.encoded = None

        return progress_bar

    def _wrap_step(self, scheduler) -> None:
        """Wrap the step of a scheduler, once; it is as it was wherever this session does not draw."""
        if any(scheduler is known for known in self.schedulers):
            return
        method = scheduler.step

        @wraps(method)
        def step(model_output, timestep, sample, *args, **kwargs):
            drawing = getattr(self.here, "drawing", None)
            if drawing is not None:
                sample = drawing.moved(sample, model_output)
            return method(model_output, timestep, sample, *args, **kwargs)

        scheduler.step = step
        self.schedulers.append(scheduler)

    def _current(self) -> "Drawing":
        drawing = getattr(self.here, "drawing", None)
        if drawing is None:
            raise SalunError(ELSEWHERE.format(self._names()))
        return drawing

    def _names(self) -> str:
        return listed(repr(name) for name, _, _ in self.guards)

    def _before(self, module, args, kwargs):
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        extra = given.pop("kwargs", {})
        return (), self._current().before(given | extra)

    def _after(self, module, args, output):
        drawing = self._current()
        if isinstance(output, tuple):
            return (drawing.after(output[0]), *output[1:])
        output.sample = drawing.after(output.sample)
        return output

    def _before_block(self, number: int, module, args, kwargs):
        skips = kwargs["res_hidden_states_tuple"]
        return args, kwargs | {"res_hidden_states_tuple": tuple(self._current().skip(number, x) for x in skips)}

    def _after_attention(self, name: str, module, args, output):
        return (self._current().attended(name, output[0]), *output[1:])


class Drawing:
    """One call in progress: the rows of the denoiser's batch, and the watches.

    Args:
        call: what is drawn.
        watches: each with the scale of its erasure.
    """

    def __init__(self, call: Call, watches: list[tuple[float, Watch]]):
        self.call, self.watches, self.number = call, watches, 0

    def before(self, given: dict[str, Any]) -> dict[str, Any]:
        """The denoiser's arguments, with the rows that the watches want beside."""
        count, rows = len(self.call.embeddings), len(given["sample"])
        if rows not in (count, 2 * count):
            raise SalunError(
                "A guard, or an adapter that is scaled by prompt, knows batches of the prompts, or of negative prompts "
                f"and prompts ({count} or {2 * count} rows), and this pipeline's has {rows}: unload_erasure(pipe) to "
                "draw with it."
            )
        self.rows, self.timestep, self.guided = rows, float(torch.as_tensor(given["timestep"]).max()), rows > count
        hidden = given["encoder_hidden_states"].clone()
        for scale, watch in self.watches:
            if (change := watch.prompt_change(self.number)) is not None:
                hidden[-count:] += (scale * change).to(hidden)
            if self.guided and (change := watch.empty_change(self.number)) is not None:
                hidden[:count] += (scale * change).to(hidden)
        more = []  # conditions, each of all pictures; whose they are is in self.places
        self.places: dict[Any, int] = {}
        if not self.guided and any(watch.wants_unconditional for _, watch in self.watches):
            self.places["unconditional"] = rows
            more.append(encode_empty(self.call.pipe))
        for _, watch in self.watches:
            if (beside := watch.beside(self.number)) is not None:
                self.places[watch] = rows + count * len(more)
                more.append(beside)
        index = torch.tensor([*range(rows), *[*range(rows - count, rows)] * len(more)], device=hidden.device)
        given = given | {"encoder_hidden_states": hidden}
        given = given | {name: _rows(given[name], index, rows) for name in PER_PICTURE if name in given}
        for place, condition in enumerate(more):
            _put(given, condition, slice(rows + count * place, rows + count * (place + 1)))
        return given

    def after(self, predicted: torch.Tensor) -> torch.Tensor:
        """The prediction for the rows that the pipeline asked for, the prompts' guarded."""
        conditional = self._prompts(predicted)
        unconditional = self._beside("unconditional", predicted)
        if self.guided:
            unconditional = predicted[: len(conditional)]
        guarded = conditional
        for scale, watch in self.watches:
            beside = self._beside(watch, predicted)
            step = Step(self.number, self.timestep, conditional, unconditional, beside)
            if (change := watch.prediction_change(step)) is not None:
                guarded = guarded + (scale * change).to(guarded)
        self.number += 1
        return torch.cat([predicted[: self.rows - len(guarded)], guarded])

    def moved(self, latents: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        """The latents that the scheduler's step starts from, after the network's prediction for them."""
        found = latents
        for scale, watch in self.watches:
            change = watch.latent_change(self.number - 1, self.timestep, latents, predicted)
            if change is not None:
                found = found + (scale * change).to(found)
        return found

    def attended(self, name: str, features: torch.Tensor) -> torch.Tensor:
        """What an attention block gives, guarded in the rows that the pipeline asked for."""
        found = features
        for scale, watch in self.watches:
            change = watch.block_change(self.timestep, name, features[: self.rows])
            if change is not None:
                found = torch.cat([found[: self.rows] + (scale * change).to(found), found[self.rows :]])
        return found

    def skip(self, block: int, features: torch.Tensor) -> torch.Tensor:
        """The features of a skip connection, the prompts' rows guarded."""
        for _, watch in self.watches:
            beside = self._beside(watch, features)
            if beside is None:
                continue
            changed = watch.skip_features(self.number, block, self._prompts(features), beside)
            if changed is not None:
                features = features.clone()
                features[self.rows - len(changed) : self.rows] = changed
        return features

    def _prompts(self, batch: torch.Tensor) -> torch.Tensor:
        return batch[self.rows - len(self.call.embeddings) : self.rows]

    def _beside(self, whose, batch: torch.Tensor) -> torch.Tensor | None:
        start = self.places.get(whose)
        return None if start is None else batch[start : start + len(self.call.embeddings)]


def _rows(value, index: torch.Tensor, rows: int):
    """``value``, or what it holds, with the rows ``index`` of its own ``rows``; what has others stays as it is."""
    if isinstance(value, torch.Tensor):
        return value[index.to(value.device)] if value.ndim and len(value) == rows else value
    if isinstance(value, dict):
        return {key: _rows(part, index, rows) for key, part in value.items()}
    return type(value)(_rows(part, index, rows) for part in value) if isinstance(value, list | tuple) else value


def _put(given: dict[str, Any], condition: dict[str, torch.Tensor], where: slice) -> None:
    """Put a condition, of one row for all or one each, into the rows ``where``."""
    given["encoder_hidden_states"][where] = condition["encoder_hidden_states"].to(given["encoder_hidden_states"])
    if "text_embeds" in condition:  # SDXL's; the sizes stay those of the picture
        pooled = given["added_cond_kwargs"]["text_embeds"]
        pooled[where] = condition["text_embeds"].to(pooled)
