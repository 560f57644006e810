"""The training loop: saliency over the forget set, then masked steps on forget and retain batches.

All randomness is a function of the seed and of what it is for: the noise and timestep of a saliency image, or of a row
of the global batch of a step. So neither the number of processes nor that of accumulation steps changes what is
computed, and a resumed run draws what the uninterrupted one would have.
"""

import json
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.optimization import get_scheduler
from tqdm import tqdm

from .config import EraseConfig
from .data import ImageSet, batches, encode
from .errors import SalunError
from .losses import denoising, denoising_target, guided
from .methods import METHODS
from .models import denoiser
from .optim import MaskedDeltas
from .saliency import scores


@dataclass
class Batch:
    """Noised pictures of one set: ``noisy`` and ``target`` ``(batch, channels, height, width)``, ``timesteps``
    ``(batch,)``, and the conditioning of the prompts and, in a forget batch, of the anchor prompts."""

    noisy: torch.Tensor
    target: torch.Tensor
    timesteps: torch.Tensor
    text: dict[str, torch.Tensor]
    anchor_text: dict[str, torch.Tensor] | None


class Trainer:
    """Holds what every step needs: the network, the noise schedule, both sets, and what the seed fixes."""

    def __init__(
        self, accelerator: Accelerator, pipe: DiffusionPipeline, forget: ImageSet, retain: ImageSet, config: EraseConfig
    ):
        self.accelerator, self.config = accelerator, config
        self.forget, self.retain = forget, retain
        self.network = denoiser(pipe).to(accelerator.device).eval()
        self.schedule = DDPMScheduler.from_config(pipe.scheduler.config)
        self.empty = encode(pipe, [""])

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, text: dict[str, torch.Tensor]) -> torch.Tensor:
        with self.accelerator.autocast():
            return self.network(noisy, timesteps, return_dict=False, **text)[0]

    def _noised(self, images: ImageSet, index: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> Batch:
        device, dtype = self.accelerator.device, self.network.dtype
        clean = images.latents[index]

        def text(which: torch.Tensor) -> dict[str, torch.Tensor]:
            return {key: value[which[index]].to(device, dtype) for key, value in images.text.items()}

        return Batch(
            noisy=self.schedule.add_noise(clean, noise, t).to(device, dtype),
            target=denoising_target(self.schedule, clean, noise, t).to(device, dtype),
            timesteps=t.to(device),
            text=text(images.prompt_index),
            anchor_text=None if images.anchor_index is None else text(images.anchor_index),
        )

    def draw(self, images: ImageSet, count: int, *key) -> tuple[torch.Tensor, torch.Tensor]:
        """``count`` noises and timesteps that depend on the seed and ``key`` alone."""
        generator = torch.Generator().manual_seed(random.Random(repr((self.config.seed, *key))).getrandbits(63))
        noise = torch.randn(count, *images.latents.shape[1:], generator=generator)
        return noise, torch.randint(self.schedule.config.num_train_timesteps, (count,), generator=generator)

    def _micro_batches(self, images: ImageSet, index: torch.Tensor, name: str, step: int) -> Iterator[Batch]:
        """This process's share of the global batch ``index``, in parts that fit."""
        noise, t = self.draw(images, len(index), name, step)
        share = torch.arange(len(index)).chunk(self.accelerator.num_processes)[self.accelerator.process_index]
        for rows in share.split(self.config.train_batch_size):
            yield self._noised(images, index[rows], noise[rows], t[rows])

    def saliency(self, parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
        """Scores of ``parameters`` from one pass over the forget set, with the reference's loss: minus the denoising
        error of the guided prediction, averaged over the set."""
        guidance, count = self.config.saliency_guidance, len(self.forget)

        def loss(index: torch.Tensor) -> torch.Tensor:
            drawn = [self.draw(self.forget, 1, "saliency", i) for i in index.tolist()]
            noise, t = (torch.cat(parts) for parts in zip(*drawn, strict=True))
            batch, share = self._noised(self.forget, index, noise, t), len(index) / count
            if guidance == 0:
                return -share * denoising(self.predict(batch.noisy, batch.timesteps, batch.text), batch.target)
            empty = {k: v.to(batch.noisy).expand(len(index), *v.shape[1:]) for k, v in self.empty.items()}
            both = {key: torch.cat([batch.text[key], empty[key]]) for key in batch.text}
            conditional, unconditional = self.predict(
                batch.noisy.repeat(2, 1, 1, 1), batch.timesteps.repeat(2), both
            ).chunk(2)
            return -share * denoising(guided(conditional, unconditional, guidance), batch.target)

        accelerator = self.accelerator
        mine = torch.arange(count)[accelerator.process_index :: accelerator.num_processes]
        bar = tqdm(
            mine.split(self.config.train_batch_size),
            desc="saliency",
            unit="batch",
            disable=not accelerator.is_main_process,
        )
        return scores(parameters, ((lambda part=part: loss(part)) for part in bar), accelerator.reduce)

    def train(self, deltas: MaskedDeltas, log: Path) -> None:
        """``max_train_steps`` steps of the method; one JSON line a step goes to ``log``.

        A step takes ``train_batch_size · gradient_accumulation_steps · processes`` pictures of each set.

        Raises:
            SalunError: the loss is NaN or Inf; the weights are then those of the last good step.
        """
        config, accelerator, method = self.config, self.accelerator, METHODS[self.config.method]
        size = config.train_batch_size * config.gradient_accumulation_steps
        forget_batches = batches(len(self.forget), size * accelerator.num_processes, config.seed)
        retain_batches = batches(len(self.retain), size * accelerator.num_processes, config.seed + 1)
        learning_rate = get_scheduler(
            config.lr_scheduler, deltas.adam, num_warmup_steps=0, num_training_steps=config.max_train_steps
        )
        started = time.perf_counter()
        with open(log if accelerator.is_main_process else os.devnull, "w") as lines:
            bar = tqdm(
                range(config.max_train_steps), desc="erasing", unit="step", disable=not accelerator.is_main_process
            )
            for step in bar:
                parts = zip(
                    self._micro_batches(self.forget, next(forget_batches), "forget", step),
                    self._micro_batches(self.retain, next(retain_batches), "retain", step),
                    strict=True,
                )
                losses = torch.zeros(2, device=accelerator.device)
                for forget, retain in parts:
                    forget_loss, retain_loss = method(self.predict, forget, retain)
                    share = len(forget.noisy) / size
                    accelerator.backward(share * (forget_loss + config.alpha * retain_loss))
                    losses += share * torch.stack([forget_loss.detach(), retain_loss.detach()])
                forget_loss, retain_loss = accelerator.reduce(losses, "mean").tolist()
                row = {
                    "step": step + 1,
                    "loss": forget_loss + config.alpha * retain_loss,
                    "forget_loss": forget_loss,
                    "retain_loss": retain_loss,
                    "learning_rate": learning_rate.get_last_lr()[0],
                }
                if not math.isfinite(row["loss"]):
                    raise SalunError(
                        f"The loss is not finite at step {step + 1}: lower --learning_rate or use "
                        "--mixed_precision no. Nothing was saved."
                    )
                deltas.step(accelerator)
                learning_rate.step()
                lines.write(json.dumps(row | {"seconds": round(time.perf_counter() - started, 3)}) + "\n")
                bar.set_postfix(forget=f"{forget_loss:.4f}", retain=f"{retain_loss:.4f}")
