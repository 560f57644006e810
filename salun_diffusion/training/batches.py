"""Forward passes of the network being edited, and the noised pictures that go through it: what a method's losses see.

All randomness is a function of the seed and of what it is for: the noise and timestep of a saliency image, or of a row
of the global batch of a step. So neither the number of processes nor that of accumulation steps changes what is
computed, and a resumed run draws what the uninterrupted one would have.
"""

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, DiffusionPipeline

from ..config import EraseConfig
from ..data.sets import ImageSet
from ..methods.losses import denoising_target
from ..models.conditioning import arguments, encode_empty
from ..models.load import denoiser
from .change import MaskedDeltas


@dataclass
class Batch:
    """Noised pictures of one set: ``noisy``, ``noise`` and ``target`` ``(batch, channels, height, width)``,
    ``timesteps`` ``(batch,)``, and the conditioning of the prompts. In a forget batch also that of the anchor prompts,
    and which ``tokens`` are the "concept" and which the "end" of the prompt, bool ``(batch, sequence)``.

    ``step`` counts the steps of the training from 0. Of a set of names, ``noisy`` and ``target`` mean nothing.
    """

    noisy: torch.Tensor
    noise: torch.Tensor
    target: torch.Tensor
    timesteps: torch.Tensor
    text: dict[str, torch.Tensor]
    anchor_text: dict[str, torch.Tensor] | None
    tokens: dict[str, torch.Tensor]
    step: int


class Passes:
    """The network, the noise schedule, the sets by kind, and what the seed fixes.

    ``deltas`` are there once the training has begun.
    """

    deltas: MaskedDeltas

    def __init__(
        self, accelerator: Accelerator, pipe: DiffusionPipeline, sets: dict[str, ImageSet], config: EraseConfig
    ):
        self.accelerator, self.pipe, self.sets, self.config = accelerator, pipe, sets, config
        self.batch_size = config.train_batch_size  # pictures of each set at once
        self.network = denoiser(pipe).to(accelerator.device).eval()
        if config.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        self.schedule = DDPMScheduler.from_config(pipe.scheduler.config)
        self.empty = encode_empty(pipe)

    @property
    def retain(self) -> ImageSet | None:
        return self.sets.get("retain")

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, text: dict[str, torch.Tensor]) -> torch.Tensor:
        with self.accelerator.autocast():
            return self.network(noisy, timesteps, return_dict=False, **arguments(text))[0]

    def predict_both(self, forget: Batch, retain: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The predictions for a forget and a retain batch by their own prompts, in one call."""
        text = {key: torch.cat([forget.text[key], retain.text[key]]) for key in forget.text}
        noisy, t = (torch.cat(pair) for pair in ((forget.noisy, retain.noisy), (forget.timesteps, retain.timesteps)))
        return self.predict(noisy, t, text).split([len(forget.noisy), len(retain.noisy)])

    def at_base(self) -> AbstractContextManager:
        """Within it, the network has the base model's weights."""
        return self.deltas.at_base()

    def repeated(self, text: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
        """The conditioning of one prompt for a batch of ``count``, where the network is."""
        where = {"device": self.accelerator.device, "dtype": self.network.dtype}
        return {key: value.to(**where).expand(count, *value.shape[1:]) for key, value in text.items()}

    def noised(
        self, images: ImageSet, index: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, step: int = 0
    ) -> Batch:
        """The pictures ``index`` of a set with ``noise`` at timesteps ``t``."""
        device, dtype = self.accelerator.device, self.network.dtype
        clean = images.latents[index]

        def text(which: torch.Tensor) -> dict[str, torch.Tensor]:
            return {key: value[which[index]].to(device, dtype) for key, value in images.text.items()}

        return Batch(
            noisy=self.schedule.add_noise(clean, noise, t).to(device, dtype),
            noise=noise.to(device, dtype),
            target=denoising_target(self.schedule, clean, noise, t).to(device, dtype),
            timesteps=t.to(device),
            text=text(images.prompt_index),
            anchor_text=None if images.anchor_index is None else text(images.anchor_index),
            tokens={kind: marked[index].to(device) for kind, marked in images.tokens.items()},
            step=step,
        )

    def draw(self, images: ImageSet, count: int, *key) -> tuple[torch.Tensor, torch.Tensor]:
        """``count`` noises and timesteps that depend on the seed and ``key`` alone."""
        generator = torch.Generator().manual_seed(random.Random(repr((self.config.seed, *key))).getrandbits(63))
        noise = torch.randn(count, *images.latents.shape[1:], generator=generator)
        return noise, torch.randint(self.schedule.config.num_train_timesteps, (count,), generator=generator)

    def micro_batches(self, images: ImageSet, index: torch.Tensor, name: str, step: int) -> Iterator[Batch]:
        """This process's share of the global batch ``index``, in parts that fit."""
        noise, t = self.draw(images, len(index), name, step)
        share = torch.arange(len(index)).chunk(self.accelerator.num_processes)[self.accelerator.process_index]
        for rows in share.split(self.batch_size):
            yield self.noised(images, index[rows], noise[rows], t[rows], step)
