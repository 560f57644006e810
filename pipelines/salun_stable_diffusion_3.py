"""Stable Diffusion 3 whose erasures are methods: a diffusers community pipeline.

pipe = DiffusionPipeline.from_pretrained(
    BASE, custom_pipeline="pipelines/salun_stable_diffusion_3.py", trust_remote_code=True
)
pipe.load_erasure("runs/airplane")
image = pipe("an airplane").images[0]
pipe.unload_erasure()
"""

from diffusers import StableDiffusion3Pipeline

from salun_diffusion.pipeline_methods import SavedAsStock


class SalunStableDiffusion3Pipeline(SavedAsStock, StableDiffusion3Pipeline):
    """`StableDiffusion3Pipeline` whose methods load, scale, list, unload and fuse erasures."""
