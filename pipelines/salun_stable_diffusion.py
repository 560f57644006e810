"""Stable Diffusion whose erasures are methods: a diffusers community pipeline.

pipe = DiffusionPipeline.from_pretrained(
    BASE, custom_pipeline="pipelines/salun_stable_diffusion.py", trust_remote_code=True
)
pipe.load_erasure("runs/airplane")
image = pipe("an airplane").images[0]
pipe.unload_erasure()
"""

import json

from diffusers import StableDiffusionPipeline

import salun_diffusion


class SalunStableDiffusionPipeline(StableDiffusionPipeline):
    """`StableDiffusionPipeline` whose methods load, scale, list, unload and fuse erasures."""

    def to_json_string(self) -> str:
        """The config as it is saved: under the name of the class that diffusers itself has, which loads it."""
        config = json.loads(super().to_json_string())
        return json.dumps(config | {"_class_name": StableDiffusionPipeline.__name__}, indent=2, sort_keys=True) + "\n"

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
