"""The sets as noised batches: what a method's losses see.

All randomness is a function of the seed and of what it is for: the noise and timestep of a saliency image, or of a row
of the global batch of a step. So neither the number of processes nor that of accumulation steps changes what is
computed, and a resumed run draws what the uninterrupted one would have.
"""

import random
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator

from ..config import EraseConfig
from ..data.cache import cached_tensors
from ..data.sets import ImageSet
from ..methods.base import Batch
from ..models.base import Condition, Model


class Batches:
    """The sets by kind, and what the seed fixes.

    Args:
        accelerator: whose device the batches are on, and which share of a global batch is this process's.
        sets: "forget", "retain", "anchor", "name": as :func:`salun_diffusion.data.sets.image_set` makes them.
        seed: of all noise and timesteps.
        size: pictures of each set at once; it may shrink while memory is short.
        num_inference_steps: of the model's sampler, for methods that denoise themselves.
        data_dir: where :meth:`cached` keeps files.
        condition_dropout: share of a step's pictures whose condition, and the anchor's, is left out.
        max_train_steps: of the whole training, for methods that have phases.
        drawing: how the run draws, as :meth:`..models.base.Model.draw` is told, for methods that watch it.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: Model,
        sets: dict[str, ImageSet],
        seed: int,
        size: int,
        num_inference_steps: int,
        data_dir: str,
        condition_dropout: float = 0.0,
        max_train_steps: int = 0,
        drawing: dict | None = None,
    ):
        self.accelerator, self.model, self.sets, self.seed, self.size = accelerator, model, sets, seed, size
        self.num_inference_steps, self.data_dir = num_inference_steps, data_dir
        self.condition_dropout, self.max_train_steps = condition_dropout, max_train_steps
        self.drawing = drawing or {}

    @classmethod
    def of(cls, accelerator: Accelerator, model: Model, sets: dict[str, ImageSet], config: EraseConfig) -> "Batches":
        """Those of a run with the settings ``config``, filled. What a setting is of no use to is not asked for."""
        drawing = {
            "num_inference_steps": config.num_inference_steps, "guidance_scale": config.guidance_scale,
            "batch_size": config.sample_batch_size,
        }  # fmt: skip
        return cls(
            accelerator, model, sets, config.seed, config.train_batch_size or 1, config.num_inference_steps or 0,
            config.data_dir, config.condition_dropout or 0.0, config.max_train_steps or 0, drawing,
        )  # fmt: skip

    @property
    def retain(self) -> ImageSet | None:
        return self.sets.get("retain")

    def cached(self, kind: str, settings: dict, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """As :func:`salun_diffusion.data.cache.cached_tensors`."""
        return cached_tensors(self.data_dir, kind, settings, make, self.accelerator)

    def noised(
        self,
        images: ImageSet,
        index: torch.Tensor,
        noise: torch.Tensor,
        t: torch.Tensor,
        step: int = 0,
        dropped: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> Batch:
        """The pictures ``index`` of a set with ``noise`` at timesteps ``t``; those ``dropped``, bool ``(batch,)``, have
        the empty condition, in place of their own and of the anchor's alike: a step compares the two. ``rows`` are
        their places in the global batch of the step, the first ones without it.
        """
        device, dtype = self.accelerator.device, self.model.dtype
        clean = images.latents[index]

        def condition(which: torch.Tensor) -> Condition:
            found = {key: self.model.moved(value[which[index]]) for key, value in images.condition.items()}
            if dropped is None or not dropped.any():
                return found
            empty, where = self.model.repeated(self.model.empty, len(index)), dropped.to(device)
            return {
                key: torch.where(where.view(-1, *[1] * (value.dim() - 1)), empty[key], value)
                for key, value in found.items()
            }

        return Batch(
            noisy=self.model.noise(clean, noise, t).to(device, dtype),
            noise=noise.to(device, dtype),
            target=self.model.target(clean, noise, t).to(device, dtype),
            timesteps=t.to(device),
            condition=condition(images.prompt_index),
            anchor_condition=None if images.anchor_index is None else condition(images.anchor_index),
            tokens={kind: marked[index].to(device) for kind, marked in images.tokens.items()},
            step=step,
            index=index,
            rows=torch.arange(len(index)) if rows is None else rows,
            dropped=dropped,
        )

    def generator(self, *key) -> torch.Generator:
        """Random numbers on the CPU that depend on the seed and ``key`` alone."""
        return torch.Generator().manual_seed(random.Random(repr((self.seed, *key))).getrandbits(63))

    def draw(self, images: ImageSet, count: int, *key) -> tuple[torch.Tensor, torch.Tensor]:
        """``count`` noises and timesteps that depend on the seed and ``key`` alone."""
        generator = self.generator(*key)
        noise = torch.randn(count, *images.latents.shape[1:], generator=generator)
        return noise, self.model.times(count, generator)

    def micro_batches(self, images: ImageSet, index: torch.Tensor, name: str, step: int) -> Iterator[Batch]:
        """This process's share of the global batch ``index``, in parts that fit."""
        noise, t = self.draw(images, len(index), name, step)
        share = torch.arange(len(index)).chunk(self.accelerator.num_processes)[self.accelerator.process_index]
        dropped = torch.zeros(len(index), dtype=torch.bool)
        if self.condition_dropout and images is not self.sets.get("name"):
            chances = torch.rand(len(index), generator=self.generator("dropped", name, step))
            dropped = chances < self.condition_dropout
        for rows in share.split(self.size):
            yield self.noised(images, index[rows], noise[rows], t[rows], step, dropped[rows], rows)
