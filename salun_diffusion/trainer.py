"""The training loop: saliency over the forget set, then masked steps on forget and retain batches."""

import json
import time
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
    """Holds what every step needs: the network, the noise schedule, both sets, and a generator that the seed fixes."""

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

    def _batch(self, images: ImageSet, index: torch.Tensor, generator: torch.Generator) -> Batch:
        device, dtype = self.accelerator.device, self.network.dtype
        clean = images.latents[index]
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.randint(self.schedule.config.num_train_timesteps, (len(index),), generator=generator)

        def text(which: torch.Tensor) -> dict[str, torch.Tensor]:
            return {key: value[which[index]].to(device, dtype) for key, value in images.text.items()}

        return Batch(
            noisy=self.schedule.add_noise(clean, noise, t).to(device, dtype),
            target=denoising_target(self.schedule, clean, noise, t).to(device, dtype),
            timesteps=t.to(device),
            text=text(images.prompt_index),
            anchor_text=None if images.anchor_index is None else text(images.anchor_index),
        )

    def saliency(self, parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
        """Scores of ``parameters`` from one pass over the forget set, with the reference's loss: minus the denoising
        error of the guided prediction."""
        size = self.config.train_batch_size
        generator = torch.Generator().manual_seed(self.config.seed)
        guidance = self.config.saliency_guidance

        def loss(index: torch.Tensor) -> torch.Tensor:
            batch = self._batch(self.forget, index, generator)
            if guidance == 0:
                return -denoising(self.predict(batch.noisy, batch.timesteps, batch.text), batch.target)
            empty = {k: v.to(batch.noisy).expand(len(index), *v.shape[1:]) for k, v in self.empty.items()}
            both = {key: torch.cat([batch.text[key], empty[key]]) for key in batch.text}
            conditional, unconditional = self.predict(
                batch.noisy.repeat(2, 1, 1, 1), batch.timesteps.repeat(2), both
            ).chunk(2)
            return -denoising(guided(conditional, unconditional, guidance), batch.target)

        parts = torch.arange(len(self.forget)).split(size)
        return scores(
            parameters, ((lambda part=part: loss(part)) for part in tqdm(parts, desc="saliency", unit="batch"))
        )

    def train(self, deltas: MaskedDeltas, log: Path) -> None:
        """``max_train_steps`` steps of the method; one JSON line a step goes to ``log``.

        Raises:
            SalunError: the loss is NaN or Inf; the weights are then those of the last good step.
        """
        config, method = self.config, METHODS[self.config.method]
        generator = torch.Generator().manual_seed(config.seed + 1)
        forget_batches = batches(len(self.forget), config.train_batch_size, config.seed)
        retain_batches = batches(len(self.retain), config.train_batch_size, config.seed + 1)
        learning_rate = get_scheduler(
            config.lr_scheduler, deltas.adam, num_warmup_steps=0, num_training_steps=config.max_train_steps
        )
        started = time.perf_counter()
        with open(log, "w") as lines:
            bar = tqdm(range(config.max_train_steps), desc="erasing", unit="step")
            for step in bar:
                forget = self._batch(self.forget, next(forget_batches), generator)
                retain = self._batch(self.retain, next(retain_batches), generator)
                forget_loss, retain_loss = method(self.predict, forget, retain)
                loss = forget_loss + config.alpha * retain_loss
                if not loss.isfinite():
                    raise SalunError(
                        f"The loss is not finite at step {step + 1}: lower --learning_rate or use "
                        "--mixed_precision no. Nothing was saved."
                    )
                self.accelerator.backward(loss)
                deltas.step()
                learning_rate.step()
                seconds = round(time.perf_counter() - started, 3)
                row = {
                    "step": step + 1,
                    "loss": loss.item(),
                    "forget_loss": forget_loss.item(),
                    "retain_loss": retain_loss.item(),
                    "seconds": seconds,
                }
                lines.write(json.dumps(row) + "\n")
                bar.set_postfix(forget=f"{row['forget_loss']:.4f}", retain=f"{row['retain_loss']:.4f}")
