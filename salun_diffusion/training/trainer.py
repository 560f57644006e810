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
from diffusers.optimization import get_scheduler

from ..config import EraseConfig
from ..data.sets import ImageSet, batches
from ..errors import SalunError
from ..files import writing
from ..masks.saliency import contrast, magnitudes, random_scores, scores, times_weights
from ..methods import find_method
from ..methods.base import GradientMethod
from ..methods.losses import denoising, guided
from ..models.base import Model
from ..process import Stopped, StopSignal, progress
from .batches import Batches
from .change import MaskedChange
from .checkpoints import Checkpoint, Checkpoints, threads_of
from .optimizer import PackedAdam

METHOD = "method."  # before the names of what a method keeps in a checkpoint


class Trainer:
    """Makes the method, and trains by it.

    Args:
        accelerator: accelerate's object for this run.
        model: whose network is trained; it goes to the accelerator's device.
        sets: the image sets by kind.
        config: the run's settings, filled.
    """

    def __init__(self, accelerator: Accelerator, model: Model, sets: dict[str, ImageSet], config: EraseConfig):
        self.accelerator, self.model, self.config = accelerator, model, config
        for module in {model.network, model.edited}:
            module.to(accelerator.device).eval()
        model.autocast = accelerator.autocast
        if config.gradient_checkpointing:
            model.network.enable_gradient_checkpointing()
        self.batches = Batches.of(accelerator, model, sets, config)
        method = find_method(config.method)
        self.method: GradientMethod = method(model, method.parse(config.method_option), self.batches)

    def saliency(self, parameters: dict[str, torch.nn.Parameter], rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Scores of ``parameters``, by the config's ``saliency``, from ``rows`` of the forget set (one concept's).

        ``contrast`` looks at as many pictures of the retain set.
        """
        kind, sets = self.config.saliency, self.batches.sets
        if kind == "magnitude":
            return magnitudes(parameters)
        if kind == "random":
            return random_scores(parameters, self.batches.generator("random saliency", int(rows[0])))
        found = self._gradients(parameters, "forget", rows, "saliency", square=kind == "fisher")
        if kind == "gradient-weight":
            return times_weights(found, parameters)
        if kind == "contrast":
            others = torch.arange(min(len(rows), len(sets["retain"])))
            return contrast(found, self._gradients(parameters, "retain", others, "retain saliency"))
        return found

    def _gradients(
        self,
        parameters: dict[str, torch.nn.Parameter],
        which: str,
        rows: torch.Tensor,
        purpose: str,
        square: bool = False,
    ) -> dict[str, torch.Tensor]:
        """The absolute sum of the gradients of one pass over ``rows`` of a set, or with ``square`` the sum of each
        picture's squared one, with the reference's loss: minus the denoising error of the guided prediction, averaged
        over them.
        """
        guidance, count, images = self.config.saliency_guidance, len(rows), self.batches.sets[which]
        predict = self.model.predict

        def loss(index: torch.Tensor) -> torch.Tensor:
            drawn = [self.batches.draw(images, 1, purpose, i) for i in index.tolist()]
            noise, t = (torch.cat(parts) for parts in zip(*drawn, strict=True))
            batch, share = self.batches.noised(images, index, noise, t), len(index) / count
            condition = self.method.told(batch, images)
            if guidance <= 1:  # as everywhere in diffusers: no guidance
                return -share * denoising(predict(batch.noisy, batch.timesteps, condition), batch.target)
            empty = self.model.repeated(self.method.nothing(), len(index))
            both = {key: torch.cat([condition[key], empty[key]]) for key in condition}
            conditional, unconditional = predict(batch.noisy.repeat(2, 1, 1, 1), batch.timesteps.repeat(2), both).chunk(
                2
            )
            return -share * denoising(guided(conditional, unconditional, guidance), batch.target)

        accelerator = self.accelerator
        share_of_rows = rows[accelerator.process_index :: accelerator.num_processes]

        def work() -> dict[str, torch.Tensor]:
            parts = share_of_rows.split(1 if square else self.batches.size)
            bar = progress(purpose, len(parts), "batch", accelerator.is_main_process, over=parts)
            return scores(parameters, ((lambda part=part: loss(part)) for part in bar), accelerator.reduce, square)

        return self.fitting(work)

    def fitting(self, work: Callable[[], Any]) -> Any:
        """``work()``; with ``auto_batch_size``, again with half the pictures at once as long as memory runs out.

        Raises:
            SalunError: not even one fits.
        """
        if not self.config.auto_batch_size:
            return work()

        def halve() -> int:
            self.batches.size //= 2
            if self.batches.size:
                self.accelerator.print(f"Out of memory: going on with {self.batches.size} pictures at once.")
            return self.batches.size

        try:
            return find_executable_batch_size(lambda batch_size: work(), self.batches.size, halve)()
        except RuntimeError as error:
            if "No executable batch size" in str(error):
                raise SalunError("Not even one picture at a time fits: try --gradient_checkpointing or bf16.") from None
            raise

    def train(
        self,
        change: MaskedChange,
        log: Path,
        checkpoints: Checkpoints,
        resumed: Checkpoint | None = None,
        validate: Callable[[int], None] | None = None,
    ) -> None:
        """``max_train_steps`` steps of the method; one JSON line a step goes to ``log``.

        A step takes ``train_batch_size · gradient_accumulation_steps · processes`` pictures of each set.

        Args:
            change: what is trained; it ends as the trained change.
            log: the file of JSON lines.
            checkpoints: where the state is saved.
            resumed: where to go on; its log replaces ``log``.
            validate: called with the number of steps done every ``validation_steps``.

        Raises:
            SalunError: the loss is NaN or Inf; the weights are then those of the last good step.
            Stopped: Ctrl-C or SIGTERM; the step was finished and a checkpoint saved.
        """
        config, accelerator = self.config, self.accelerator
        adam = PackedAdam(change, config.learning_rate, self.method.own, self.method.own_rate)
        self.change, self.adam = change, adam
        self.method.begin(change)
        size = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        forget_batches = batches(len(self.batches.sets[self.method.forget_set]), size, config.seed)
        retain = self.batches.retain
        retain_batches = batches(len(retain), size, config.seed + 1) if retain else repeat(None)
        optimizer = accelerator.prepare(adam.adam)
        learning_rate = get_scheduler(
            config.lr_scheduler, optimizer, num_warmup_steps=0, num_training_steps=config.max_train_steps
        )
        start = 0
        if resumed:
            start = resumed.step
            adam.load_state(resumed.tensors, resumed.state["updates"])
            found = {name: value for name, value in resumed.tensors.items() if name.startswith(METHOD)}
            self.method.load_state({name.removeprefix(METHOD): value for name, value in found.items()})
            learning_rate.load_state_dict(resumed.state["learning_rate"])
            for group, rate in zip(adam.adam.param_groups, learning_rate.get_last_lr(), strict=True):
                group["lr"] = rate
            if accelerator.scaler:
                accelerator.scaler.load_state_dict(resumed.state["scaler"])
        started = time.perf_counter()

        def save(step: int) -> None:
            state = {
                "updates": adam.updates,
                "learning_rate": learning_rate.state_dict(),
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
                "threads": threads_of(resumed),
            }
            if accelerator.is_main_process:
                tensors = adam.state() | {METHOD + name: value for name, value in self.method.state().items()}
                checkpoints.save(step, tensors, change.masks, {"concept": ", ".join(config.concept)}, log, state)
            accelerator.wait_for_everyone()

        with (
            writing(log),
            open(log if accelerator.is_main_process else os.devnull, "w", buffering=1) as lines,
            StopSignal() as stop,
            progress("erasing", config.max_train_steps, "step", accelerator.is_main_process, initial=start) as bar,
        ):
            lines.write(resumed.log if resumed else "")
            for step in range(config.max_train_steps):
                forget_index, retain_index = next(forget_batches), next(retain_batches)
                if step < start:
                    continue
                work = partial(self.accumulate, forget_index, retain_index, step)
                losses = self.fitting(work) if step == start else work()
                # one reduction tells every process the mean losses, and whether anyone wants to stop
                means = accelerator.reduce(torch.cat([losses, losses.new_tensor([float(stop.wanted)])]), "mean")
                forget_loss, retain_loss, wanted = means.tolist()
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
                adam.reduce(accelerator)
                optimizer.step()
                optimizer.zero_grad()
                change.write()
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
                    raise Stopped(
                        f"Stopped after step {done} of {config.max_train_steps}; its state is saved. To go on: the "
                        "same command with --resume_from_checkpoint latest."
                    )
                if config.checkpointing_steps and done % config.checkpointing_steps == 0:
                    save(done)

    def accumulate(self, forget_index: torch.Tensor, retain_index: torch.Tensor | None, step: int) -> torch.Tensor:
        """Add up this process's share of a step's gradient, batch by batch; returns its mean forget and retain loss,
        ``(2,)``.
        """
        config = self.config
        self.adam.clear_gradients()
        losses = torch.zeros(2, device=self.accelerator.device)
        whole = config.train_batch_size * config.gradient_accumulation_steps
        sets, parts = self.batches.sets, self.batches.micro_batches
        forgets = parts(sets[self.method.forget_set], forget_index, "forget", step)
        retains = parts(sets["retain"], retain_index, "retain", step) if "retain" in sets else repeat(None)
        for forget, retain in zip(forgets, retains, strict=False):  # the same number of each, or endless Nones
            retain = self.method.retained(retain) if retain else None
            if retain and config.retain_target == "base":
                with self.change.at_base(), torch.no_grad():
                    retain.target = self.model.predict(retain.noisy, retain.timesteps, retain.condition)
            forget_loss, retain_loss = self.method.losses(forget, retain)
            share = len(forget.noisy) / whole
            self.accelerator.backward(share * (forget_loss + (config.alpha or 0) * retain_loss))
            losses += share * torch.stack([forget_loss.detach(), retain_loss.detach()])
        return losses
