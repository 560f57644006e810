"""Sana whose erasures are methods: a diffusers community pipeline.

pipe = DiffusionPipeline.from_pretrained(
    BASE, custom_pipeline="pipelines/salun_sana.py", trust_remote_code=True
)
pipe.load_erasure("runs/airplane")
image = pipe("an airplane").images[0]
pipe.unload_erasure()
"""

from diffusers import SanaPipeline

from salun_diffusion.pipeline_methods import SavedAsStock


class SalunSanaPipeline(SavedAsStock, SanaPipeline):
    """`SanaPipeline` whose methods load, scale, list, unload and fuse erasures."""
