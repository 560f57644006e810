"""The training loop of every gradient method: saliency over the forget set, then masked steps."""

import json
import math
import os
import time
from collections.abc import Callable
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from tqdm import tqdm

from ..config import EraseConfig
from ..data.sets import ImageSet, batches
from ..errors import SalunError
from ..masks.saliency import scores
from ..methods import find_method
from ..methods.base import Gradient
from ..methods.losses import denoising, guided
from ..process import Stopped, StopSignal
from .batches import Passes
from .change import MaskedDeltas
from .checkpoints import Checkpoint, Checkpoints


class Trainer(Passes):
    """Makes the method, and trains by it."""

    def __init__(
        self, accelerator: Accelerator, pipe: DiffusionPipeline, sets: dict[str, ImageSet], config: EraseConfig
    ):
        super().__init__(accelerator, pipe, sets, config)
        self.method: Gradient = find_method(config.method)(self)

    def saliency(self, parameters: dict[str, torch.nn.Parameter], rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Scores of ``parameters`` from one pass over ``rows`` of the forget set (indices: one concept's), with the
        reference's loss: minus the denoising error of the guided prediction, averaged over them."""
        guidance, count, forget = self.config.saliency_guidance, len(rows), self.sets["forget"]

        def loss(index: torch.Tensor) -> torch.Tensor:
            drawn = [self.draw(forget, 1, "saliency", i) for i in index.tolist()]
            noise, t = (torch.cat(parts) for parts in zip(*drawn, strict=True))
            batch, share = self.noised(forget, index, noise, t), len(index) / count
            if guidance == 0:
                return -share * denoising(self.predict(batch.noisy, batch.timesteps, batch.text), batch.target)
            empty = self.repeated(self.empty, len(index))
            both = {key: torch.cat([batch.text[key], empty[key]]) for key in batch.text}
            conditional, unconditional = self.predict(
                batch.noisy.repeat(2, 1, 1, 1), batch.timesteps.repeat(2), both
            ).chunk(2)
            return -share * denoising(guided(conditional, unconditional, guidance), batch.target)

        accelerator = self.accelerator
        mine = rows[accelerator.process_index :: accelerator.num_processes]

        def work() -> dict[str, torch.Tensor]:
            parts = mine.split(self.batch_size)
            bar = tqdm(parts, desc="saliency", unit="batch", disable=not accelerator.is_main_process)
            return scores(parameters, ((lambda part=part: loss(part)) for part in bar), accelerator.reduce)

        return self.fitting(work)

    def fitting(self, work: Callable[[], Any]) -> Any:
        """``work()``; with ``auto_batch_size``, again with half the pictures at once as long as memory runs out.

        Raises:
            SalunError: not even one fits.
        """
        if not self.config.auto_batch_size:
            return work()

        def halve() -> int:
            self.batch_size //= 2
            if self.batch_size:
                self.accelerator.print(f"Out of memory: going on with {self.batch_size} pictures at once.")
            return self.batch_size

        try:
            return find_executable_batch_size(lambda batch_size: work(), self.batch_size, halve)()
        except RuntimeError as error:
            if "No executable batch size" in str(error):
                raise SalunError("Not even one picture at a time fits: try --gradient_checkpointing or bf16.") from None
            raise

    def train(
        self,
        deltas: MaskedDeltas,
        log: Path,
        checkpoints: Checkpoints,
        resumed: Checkpoint | None = None,
        validate: Callable[[int], None] | None = None,
    ) -> None:
        """``max_train_steps`` steps of the method; one JSON line a step goes to ``log``.

        A step takes ``train_batch_size · gradient_accumulation_steps · processes`` pictures of each set.

        Args:
            resumed: where to go on; its log replaces ``log``.
            validate: called with the number of steps done every ``validation_steps``.

        Raises:
            SalunError: the loss is NaN or Inf; the weights are then those of the last good step.
            Stopped: Ctrl-C or SIGTERM; the step was finished and a checkpoint saved.
        """
        config, accelerator = self.config, self.accelerator
        self.deltas = deltas
        size = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        forget_batches = batches(len(self.sets[self.method.forgets]), size, config.seed)
        retain_batches = batches(len(self.retain), size, config.seed + 1) if self.retain else repeat(None)
        optimizer = accelerator.prepare(deltas.adam)
        learning_rate = get_scheduler(
            config.lr_scheduler, optimizer, num_warmup_steps=0, num_training_steps=config.max_train_steps
        )
        start = 0
        if resumed:
            start = resumed.step
            deltas.load_state(resumed.tensors, resumed.state["updates"])
            learning_rate.load_state_dict(resumed.state["learning_rate"])
            deltas.adam.param_groups[0]["lr"] = learning_rate.get_last_lr()[0]
            if accelerator.scaler:
                accelerator.scaler.load_state_dict(resumed.state["scaler"])
        started = time.perf_counter()

        def save(step: int) -> None:
            state = {
                "updates": deltas.updates,
                "learning_rate": learning_rate.state_dict(),
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
            }
            if accelerator.is_main_process:
                checkpoints.save(step, deltas.state(), deltas.masks, {"concept": ", ".join(config.concept)}, log, state)
            accelerator.wait_for_everyone()

        with (
            open(log if accelerator.is_main_process else os.devnull, "w", buffering=1) as lines,
            StopSignal() as stop,
            tqdm(
                total=config.max_train_steps,
                initial=start,
                desc="erasing",
                unit="step",
                disable=not accelerator.is_main_process,
            ) as bar,
        ):
            lines.write(resumed.log if resumed else "")
            for step in range(config.max_train_steps):
                forget_index, retain_index = next(forget_batches), next(retain_batches)
                if step < start:
                    continue
                work = partial(self.accumulate, forget_index, retain_index, step)
                losses = self.fitting(work) if step == start else work()
                # one reduction tells every process the mean losses, and whether anyone wants to stop
                told = accelerator.reduce(torch.cat([losses, losses.new_tensor([float(stop.wanted)])]), "mean")
                forget_loss, retain_loss, wanted = told.tolist()
                row = {
                    "step": step + 1,
                    "loss": forget_loss + (config.alpha or 0) * retain_loss,
                    "forget_loss": forget_loss,
                    "retain_loss": retain_loss,
                    "learning_rate": learning_rate.get_last_lr()[0],
                }
                if not math.isfinite(row["loss"]):
                    kept = checkpoints.newest_valid()
                    raise SalunError(
                        f"The loss is not finite at step {step + 1}: lower --learning_rate, or use --mixed_precision "
                        + (f"no. {kept} holds the last state that was saved." if kept else "no. Nothing was saved.")
                    )
                deltas.reduce(accelerator)
                optimizer.step()
                optimizer.zero_grad()
                deltas.write()
                learning_rate.step()
                lines.write(json.dumps(row | {"seconds": round(time.perf_counter() - started, 3)}) + "\n")
                accelerator.log(row, step=step + 1)
                bar.update()
                bar.set_postfix(forget=f"{forget_loss:.4f}", retain=f"{retain_loss:.4f}")
                done = step + 1
                if validate and config.validation_steps and done % config.validation_steps == 0:
                    validate(done)
                if wanted and done < config.max_train_steps:
                    save(done)
                    raise Stopped(f"Stopped after step {done} of {config.max_train_steps}; its state is saved.")
                if config.checkpointing_steps and done % config.checkpointing_steps == 0:
                    save(done)

    def accumulate(self, forget_index: torch.Tensor, retain_index: torch.Tensor | None, step: int) -> torch.Tensor:
        """Add up this process's share of a step's gradient, batch by batch; returns its mean forget and retain loss,
        ``(2,)``."""
        config = self.config
        self.deltas.clear_gradients()
        losses = torch.zeros(2, device=self.accelerator.device)
        mine = config.train_batch_size * config.gradient_accumulation_steps
        forgets = self.micro_batches(self.sets[self.method.forgets], forget_index, "forget", step)
        retains = self.micro_batches(self.retain, retain_index, "retain", step) if self.retain else repeat(None)
        for forget, retain in zip(forgets, retains, strict=False):  # the same number of each, or endless Nones
            if retain and config.retain_target == "base":
                with self.at_base(), torch.no_grad():
                    retain.target = self.predict(retain.noisy, retain.timesteps, retain.text)
            forget_loss, retain_loss = self.method.losses(forget, retain)
            share = len(forget.noisy) / mine
            self.accelerator.backward(share * (forget_loss + (config.alpha or 0) * retain_loss))
            losses += share * torch.stack([forget_loss.detach(), retain_loss.detach()])
        return losses
