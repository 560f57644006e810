"""PixArt-Sigma whose erasures are methods: a diffusers community pipeline.

pipe = DiffusionPipeline.from_pretrained(
    BASE, custom_pipeline="pipelines/salun_pixart_sigma.py", trust_remote_code=True
)
pipe.load_erasure("runs/airplane")
image = pipe("an airplane").images[0]
pipe.unload_erasure()
"""

from diffusers import PixArtSigmaPipeline

from salun_diffusion.pipeline_methods import SavedAsStock


class SalunPixArtSigmaPipeline(SavedAsStock, PixArtSigmaPipeline):
    """`PixArtSigmaPipeline` whose methods load, scale, list, unload and fuse erasures."""
