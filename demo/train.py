"""Train the demo model from nothing: artwork → scenes → autoencoder → judge → text encoder → U-Net.

    python -m demo.train
    python -m demo.train --device cuda --steps 60000
    python -m demo.train --without airplane --output_dir runs/without-airplane

With --without, the text encoder and the U-Net learn from the scenes that do not show that object, style or background,
by the same recipe and seed: the exact answer to forgetting it. The autoencoder and the judge are the same.

Everything is kept in --work_dir and a killed run goes on where it was. The artwork comes from npm (``npm`` must be
installed; nothing of it is stored in this repository). At the end ``demo/model`` is written: a StableDiffusionPipeline
folder in fp16, with the judge beside its weights. Then ``python -m demo.measure`` says how good it is.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from salun_diffusion.options import option, run_command

HERE = Path(__file__).parent


@dataclass
class TrainConfig:
    """The options of ``python -m demo.train``."""

    work_dir: str = option("runs/demo", "caches and checkpoints")
    output_dir: str | None = option(None, "the pipeline folder to write (default: demo/model)")
    autoencoder_steps: int = option(9000, "steps of 32 pictures", least=1)
    judge_steps: int = option(4000, "steps of 64 pictures", least=1)
    text_steps: int = option(3000, "steps of the text encoder, of 128 captions", least=1)
    steps: int = option(18000, "steps of the U-Net, of 32 scenes", least=1)
    without: str | None = option(None, "an object, style or background to leave out; needs --output_dir")
    device: str = option("cpu", "where the U-Net trains", ("cpu", "cuda"))
    stage: str = option("all", "train only one part, its inputs being there", ("all", "judge", "model"))


def train(config: TrainConfig) -> None:
    """Artwork, scenes, autoencoder, judge, text encoder and U-Net, each made unless ``work_dir`` has it.

    Raises:
        SalunError: a concept to leave out that the scenes do not have, or no folder of its own for a model without one;
            the disk refuses a file.
    """
    from salun_diffusion.errors import SalunError

    from .scenes import BACKGROUNDS, OBJECTS, STYLES

    if config.without is not None:
        if config.without not in (known := (*OBJECTS, *STYLES, *BACKGROUNDS)):
            raise SalunError(f"--without '{config.without}' is not in the scenes: name one of {', '.join(known)}.")
        if config.output_dir is None:
            raise SalunError(f"A model without '{config.without}' needs a folder of its own: give --output_dir.")

    import torch
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
    from safetensors.torch import load_file

    from salun_diffusion.files import write_json

    from . import autoencoder, judge, model, sprites, training
    from .vocabulary import vocabulary

    work, output = Path(config.work_dir), Path(config.output_dir or HERE / "model")
    art = sprites.load(work / "sprites")
    pictures = training.pictures(training.TRAIN_SEEDS, art, work / "train.safetensors")
    held_out = training.pictures(training.HELD_OUT_SEEDS, art, work / "held-out.safetensors")

    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "concepts.json", vocabulary())

    vae = autoencoder.train(pictures, work / "autoencoder.safetensors", config.autoencoder_steps)
    cache = work / "latents.safetensors"
    if not cache.exists():
        training.write_tensors(cache, {"latents": autoencoder.encode(vae, pictures)}, {})
    latents = load_file(cache)["latents"]
    autoencoder.standardise(vae, latents, autoencoder.SCALE)
    latents = (latents - latents.mean((0, 2, 3), keepdim=True)) / latents.std((0, 2, 3), keepdim=True)
    latents *= autoencoder.SCALE
    print(f"autoencoder: {autoencoder.psnr(vae, held_out[:1024]):.2f} dB on held-out scenes")

    if config.stage in ("all", "judge"):
        folder = output / "judge"
        judge.train(pictures, latents, vae, work, config.judge_steps).half().save_pretrained(folder)
        judge.processor().save_pretrained(folder)
    if config.stage in ("all", "model"):
        words = model.tokenizer(work / "tokenizer")
        encoder = model.train_text(words, work, config.text_steps, config.without)
        unet = model.train(latents, words, encoder, work, config.steps, config.device, config.without)
        pipe = StableDiffusionPipeline(
            vae=vae,
            text_encoder=encoder.cpu(),
            tokenizer=words,
            unet=unet.cpu(),
            scheduler=DPMSolverMultistepScheduler(**model.SCHEDULE, timestep_spacing="trailing", steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.to(dtype=torch.float16).save_pretrained(output)
        # transformers loads a model in the dtype that its config names, diffusers in fp32: a plain from_pretrained of
        # the pipeline would mix the two
        text_config = output / "text_encoder" / "config.json"
        write_json(text_config, json.loads(text_config.read_text()) | {"dtype": "float32"})


if __name__ == "__main__":
    run_command("python -m demo.train", __doc__, TrainConfig, train)
