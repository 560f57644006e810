"""Class-conditional U-Nets on pixels, whose erasures are methods: a diffusers community pipeline.

pipe = DiffusionPipeline.from_pretrained(
    BASE, custom_pipeline="pipelines/salun_class_conditional.py", trust_remote_code=True
)
pipe.load_erasure("runs/3")
image = pipe("3").images[0]  # or its number; guidance_scale=3 unless given
pipe.unload_erasure()
"""

import salun_diffusion
from salun_diffusion.models import class_pipeline


class SalunClassConditionalPipeline(class_pipeline.ClassConditionalPipeline):
    """A `UNet2DModel` with class embeddings, and methods that load, scale, list, unload and fuse erasures."""

    def load_erasure(self, source, *, scale=1.0, name=None, revision=None, check_base=True) -> str:
        """Applies an erasure (a file, a run folder or a hub id); see `salun_diffusion.load_erasure`."""
        return salun_diffusion.load_erasure(
            self, source, scale=scale, name=name, revision=revision, check_base=check_base
        )

    def set_erasure_scale(self, name, scale) -> None:
        """Applies a loaded erasure at another scale; see `salun_diffusion.set_erasure_scale`."""
        salun_diffusion.set_erasure_scale(self, name, scale)

    def unload_erasure(self, name=None) -> None:
        """Takes off one erasure, or all; see `salun_diffusion.unload_erasure`."""
        salun_diffusion.unload_erasure(self, name)

    def list_erasures(self) -> list[dict]:
        """What is applied; see `salun_diffusion.list_erasures`."""
        return salun_diffusion.list_erasures(self)

    def fuse_erasure(self) -> None:
        """Makes what is applied permanent; see `salun_diffusion.fuse_erasure`."""
        salun_diffusion.fuse_erasure(self)
