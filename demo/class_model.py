"""What the class-conditional models of the demo room share: how one is trained, saved and judged."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiTPipeline, DiTTransformer2DModel, UNet2DModel

from salun_diffusion.concepts.concept import Row
from salun_diffusion.files import write_json
from salun_diffusion.models import load_model
from salun_diffusion.models.class_pipeline import ClassConditionalPipeline

from .class_judge import prepared, processor
from .training import Average, Checkpoint, in_bf16, loop


@dataclass(frozen=True)
class Recipe:
    """How a class-conditional network is trained: noise prediction, some labels replaced by the null class, the weights
    averaged (EMA).

    Attributes:
        network: its config, without the number of classes; the null class comes after them.
        schedule: the config of the noise schedule.
        batch: pictures a step.
        rate: the learning rate of a step, of so many steps.
        decay: the weight decay of AdamW.
        average: the share of the average that a step keeps, in the end.
        dropped: the share of labels that are left out.
        flip: whether half of the pictures are mirrored.
        antithetic: whether each timestep t comes with 999 − t, as published.
        bfloat16: whether it trains in bf16 where that is faster; the weights are fp32.
        kind: the network's class.
    """

    network: dict
    schedule: dict
    batch: int
    rate: Callable[[int, int], float]
    decay: float = 0.01
    average: float = 0.998
    dropped: float = 0.1
    flip: bool = False
    antithetic: bool = False
    bfloat16: bool = False
    kind: type[UNet2DModel] | type[DiTTransformer2DModel] = UNet2DModel

    def build(self, classes: int) -> UNet2DModel | DiTTransformer2DModel:
        """The network with random weights, in the mode in which it is trained."""
        if self.kind is UNet2DModel:
            return self.kind(**self.network, num_class_embeds=classes + 1).train()
        # it adds the null class by itself; in train mode each block would leave out labels of its own
        return self.kind(**self.network, num_embeds_ada_norm=classes).eval()


def train(
    recipe: Recipe, pictures: torch.Tensor, labels: torch.Tensor, classes: int, name: str, file: Path, steps: int,
    seed: int, device: str = "cpu", averaged: bool = True,
) -> UNet2DModel | DiTTransformer2DModel:  # fmt: skip
    """A trained network, in eval mode on the CPU.

    Args:
        recipe: how.
        pictures: uint8, or fp32 as the network is to draw them, ``(n, channels, side, side)``.
        labels: int64 ``(n,)``.
        classes: how many there are, also those that no picture shows.
        name: for the progress bar.
        file: the checkpoint.
        steps: of ``recipe.batch`` pictures.
        seed: of the first weights and of every draw.
        device: where it trains; what is drawn at random is the same everywhere.
        averaged: whether the weights are the moving average.
    """
    torch.manual_seed(seed)
    network = recipe.build(classes).to(device)
    schedule = DDPMScheduler(**recipe.schedule)
    average = Average(network, recipe.average)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=recipe.decay, fused=True)

    def loss_of(step: int) -> torch.Tensor:
        torch.manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(pictures), (recipe.batch,))
        told = torch.where(torch.rand(recipe.batch) < recipe.dropped, classes, labels[rows])
        clean = pictures[rows]
        clean = clean if clean.is_floating_point() else clean.float() / 127.5 - 1
        noise, t = torch.randn_like(clean), torch.randint(1000, (recipe.batch,))
        if recipe.antithetic:
            t = torch.cat([t[: (recipe.batch + 1) // 2], 999 - t])[: recipe.batch]
        if recipe.flip:
            clean = torch.where((torch.rand(recipe.batch) < 0.5).view(-1, 1, 1, 1), clean.flip(3), clean)
        noisy = schedule.add_noise(clean, noise, t)
        with in_bf16(device, recipe.bfloat16):
            predicted = network(noisy.to(device), t.to(device), told.to(device)).sample
        return (predicted.float() - noise.to(device)).square().mean()

    checkpoint = Checkpoint(file, network, optimizer, average.weights)
    loop(name, steps, checkpoint, lambda step: recipe.rate(step, steps), loss_of, average.update)
    if averaged:
        average.put_in()
    return network.cpu().eval()


def save(
    network, scheduler, names: list[str], judge, side: int, settings: dict, folder: Path,
    vae: AutoencoderKL | None = None,
) -> None:  # fmt: skip
    """A class-conditional pipeline in fp16, its judge of pictures of ``side`` px, and its settings, in ``folder``; a
    network that draws the latents of a ``vae`` is a DiT.
    """
    if vae is None:
        pipe = ClassConditionalPipeline(network, scheduler, dict(enumerate(names)))
    else:
        pipe = DiTPipeline(network, vae, scheduler)
        pipe.register_to_config(id2label=dict(enumerate(names)))  # which that class forgets
    pipe.to(dtype=torch.float16).save_pretrained(folder)
    judge.half().save_pretrained(folder / "judge")
    processor(side).save_pretrained(folder / "judge")
    judge.float()
    write_json(folder / "concepts.json", settings)


def judged(folder: Path, judge, side: int, settings: dict, pictures: int, without: str | None) -> str:
    """What the judge says of ``pictures`` drawn for each class, drawn as the model's settings say.

    Args:
        folder: of the model.
        judge: of pictures of ``side`` px.
        side: pixels.
        settings: "num_inference_steps", "guidance_scale" and "sample_batch_size".
        pictures: of each class.
        without: a class that the model never saw.
    """
    model = load_model(str(folder))
    names = model.names
    rows = [Row(name, None, {}, 1000 * pictures + i) for name in names for i in range(pictures)]
    how = {key: settings[key] for key in ("num_inference_steps", "guidance_scale")}
    how |= {"batch_size": settings["sample_batch_size"], "output_type": "np"}
    drawn = torch.from_numpy(np.stack(model.draw(rows, progress="drawing", **how))).permute(0, 3, 1, 2) * 2 - 1
    with torch.no_grad():
        named = torch.cat([judge(prepared(part, side)).logits.argmax(1) for part in drawn.split(100)]).view(
            len(names), -1
        )
    right = (named == torch.arange(len(names)).view(-1, 1)).float()
    each = ", ".join(f"{name} {100 * share:.0f}%" for name, share in zip(names, right.mean(1).tolist(), strict=True))
    told = f"The judge sees what was asked for in {100 * right.mean():.1f}% of {len(rows)} pictures ({each})."
    if without is not None:
        counts = torch.bincount(named[names.index(without)], minlength=len(names)).tolist()
        shown = ", ".join(f"{name} ({count})" for name, count in zip(names, counts, strict=True) if count)
        told += f"\nAsked for {without}, which it never saw, it draws {shown}."
    return told


def read_settings(file: Path, slot: str) -> tuple[dict, dict]:
    """A concepts.json, and what it says of drawing and training for ``slot``."""
    found = json.loads(file.read_text(encoding="utf-8"))
    return found, found["settings"][slot]
