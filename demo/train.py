"""Train the demo model from nothing: artwork → scenes → autoencoder → judge → text-to-image model.

    python -m demo.train
    python -m demo.train --device cuda --steps 60000

Everything is kept in --work_dir and a killed run goes on where it was. The artwork comes from npm (``npm`` must be
installed; nothing of it is stored in this repository). At the end ``demo/model`` is written: a StableDiffusionPipeline
folder in fp16, with the judge beside its weights. Then ``python -m demo.measure`` says how good it is.
"""

import argparse
import json
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m demo.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work_dir", type=Path, default=Path("runs/demo"), help="caches and checkpoints (default: %(default)s)"
    )
    parser.add_argument(
        "--output_dir", type=Path, default=HERE / "model", help="the pipeline folder to write (default: demo/model)"
    )
    parser.add_argument(
        "--autoencoder_steps", type=int, default=3600, help="steps of 32 pictures (default: %(default)s)"
    )
    parser.add_argument("--judge_steps", type=int, default=4000, help="steps of 64 pictures (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=20000, help="text-to-image steps of 32 scenes (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        default="cpu",
        choices=("cpu", "cuda"),
        help="where the text-to-image model trains (default: %(default)s)",
    )
    parser.add_argument(
        "--stage",
        default="all",
        choices=("all", "judge", "model"),
        help="train only one part, its inputs being there (default: %(default)s)",
    )
    args = parser.parse_args()

    import torch
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
    from safetensors.torch import load_file

    from salun_diffusion.files import write_json

    from . import autoencoder, judge, model, sprites, training
    from .vocabulary import vocabulary

    work = args.work_dir
    art = sprites.load(work / "sprites")
    pictures = training.pictures(training.TRAIN_SEEDS, art, work / "train.safetensors")
    held_out = training.pictures(training.HELD_OUT_SEEDS, art, work / "held-out.safetensors")

    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / "concepts.json", vocabulary())

    vae = autoencoder.train(pictures, work, args.autoencoder_steps)
    cache = work / "latents.safetensors"
    if not cache.exists():
        training.write_tensors(cache, {"latents": autoencoder.encode(vae, pictures)}, {})
    latents = load_file(cache)["latents"]
    autoencoder.standardise(vae, latents)
    latents = (latents - latents.mean((0, 2, 3), keepdim=True)) / latents.std((0, 2, 3), keepdim=True)
    print(f"autoencoder: {autoencoder.psnr(vae, held_out[:1024]):.2f} dB on held-out scenes")

    if args.stage in ("all", "judge"):
        folder = args.output_dir / "judge"
        judge.train(pictures, latents, vae, work, args.judge_steps).half().save_pretrained(folder)
        judge.processor().save_pretrained(folder)
    if args.stage in ("all", "model"):
        words = model.tokenizer(work / "tokenizer")
        trained = model.train(latents, words, work, args.steps, args.device).cpu()
        pipe = StableDiffusionPipeline(
            vae=vae,
            text_encoder=trained["text_encoder"],
            tokenizer=words,
            unet=trained["unet"],
            scheduler=DPMSolverMultistepScheduler(**model.SCHEDULE, timestep_spacing="trailing", steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.to(dtype=torch.float16).save_pretrained(args.output_dir)
        # transformers loads a model in the dtype that its config names, diffusers in fp32: a plain from_pretrained of
        # the pipeline would mix the two
        text_config = args.output_dir / "text_encoder" / "config.json"
        write_json(text_config, json.loads(text_config.read_text()) | {"dtype": "float32"})


if __name__ == "__main__":
    main()
