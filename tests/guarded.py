"""Pipelines under guards, and plain loops to hold them against."""

import torch
from transformers import CLIPImageProcessor, ResNetConfig, ResNetForImageClassification

from salun_diffusion import erase, load_erasure

PROMPTS = ["a picture of an airplane", "a red cat on a house"]
STEPS = 5
STRONG = {  # options with which a guard is seen in the pictures of random networks, and made in no time
    "sld": {"level": "max"},
    "safree": {"steps": "all"},
    "concept_steerers": {"train_steps": 2, "strength": 5.0},
    "saeuron": {"train_steps": 2, "pictures": 2, "steps": 2, "percentile": 90, "multiplier": -50.0, "batch_places": 64},
    "groce": {},
    "egloce": {"step_size": 0.05, "inner_steps": 2},
}


def judged(folder):
    """The folder of a pipeline, with a small classifier of random weights in it."""
    if not (folder / "judge").exists():
        torch.manual_seed(0)
        labels = dict(enumerate(["left:airplane", "left:cat", "left:nothing", "count:one", "count:two"]))
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
        known = {"id2label": labels, "label2id": {label: index for index, label in labels.items()}}
        ResNetForImageClassification(ResNetConfig(**sizes, **known)).save_pretrained(folder / "judge")
        processor = CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
        processor.save_pretrained(folder / "judge")
    return folder


def guard(pipe, method, folder, concept="airplane", **options):
    """The folder of a guard, loaded on ``pipe``."""
    run = erase(pipe, concept, method=method, output_dir=folder / f"{method}-{concept}", **options)
    load_erasure(pipe, run.path)
    return run.path


def draw(pipe, prompts=PROMPTS, seeds=None, **more):
    """Latents, one generator a picture."""
    count = len(prompts) * more.get("num_images_per_prompt", 1)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or range(count)]
    how = {"num_inference_steps": STEPS, "guidance_scale": 7.5, "output_type": "latent"} | more
    return pipe(prompts, generator=generators, **how).images


def close(one, other):
    return torch.allclose(one, other, rtol=1e-4, atol=2e-5)


def looped(pipe, predict, guidance):
    """A plain loop of DDIM from the same noise; ``predict(x, t, number, row)`` gives (conditional, unconditional)."""
    pipe.scheduler.set_timesteps(STEPS)
    pictures = []
    for row in range(len(PROMPTS)):
        shape = (1, 4, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(row), dtype=pipe.unet.dtype)
        for number, t in enumerate(pipe.scheduler.timesteps):
            conditional, unconditional = predict(x, t, number, row)
            x = pipe.scheduler.step(unconditional + guidance * (conditional - unconditional), t, x).prev_sample
        pictures.append(x)
    return torch.cat(pictures)
