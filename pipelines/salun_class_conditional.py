"""Class-conditional U-Nets on pixels, whose erasures are methods: a diffusers community pipeline.

pipe = DiffusionPipeline.from_pretrained(
    BASE, custom_pipeline="pipelines/salun_class_conditional.py", trust_remote_code=True
)
pipe.load_erasure("runs/3")
image = pipe("3").images[0]  # or its number; guidance_scale=3 unless given
pipe.unload_erasure()
"""

from salun_diffusion.models import class_pipeline  # the class itself here would be a second one for diffusers
from salun_diffusion.pipeline_methods import Erasures


class SalunClassConditionalPipeline(Erasures, class_pipeline.ClassConditionalPipeline):
    """A `UNet2DModel` with class embeddings, and methods that load, scale, list, unload and fuse erasures."""
