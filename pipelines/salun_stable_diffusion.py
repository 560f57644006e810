"""Stable Diffusion whose erasures are methods: a diffusers community pipeline.

pipe = DiffusionPipeline.from_pretrained(
    BASE, custom_pipeline="pipelines/salun_stable_diffusion.py", trust_remote_code=True
)
pipe.load_erasure("runs/airplane")
image = pipe("an airplane").images[0]
pipe.unload_erasure()
"""

from diffusers import StableDiffusionPipeline

from salun_diffusion.pipeline_methods import SavedAsStock


class SalunStableDiffusionPipeline(SavedAsStock, StableDiffusionPipeline):
    """`StableDiffusionPipeline` whose methods load, scale, list, unload and fuse erasures."""
