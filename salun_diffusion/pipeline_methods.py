"""What the community pipelines of ``pipelines/`` add to diffusers' own classes."""

from . import loader


class Erasures:
    """Methods that load, scale, list, unload and fuse erasures, for a class that is a diffusers pipeline too."""

    def load_erasure(self, source, *, scale=1.0, name=None, revision=None, check_base=True) -> str:
        """Applies an erasure (a file, a run folder or a hub id); see `salun_diffusion.load_erasure`."""
        return loader.load_erasure(self, source, scale=scale, name=name, revision=revision, check_base=check_base)

    def set_erasure_scale(self, name, scale) -> None:
        """Applies a loaded erasure at another scale; see `salun_diffusion.set_erasure_scale`."""
        loader.set_erasure_scale(self, name, scale)

    def unload_erasure(self, name=None) -> None:
        """Takes off one erasure, or all; see `salun_diffusion.unload_erasure`."""
        loader.unload_erasure(self, name)

    def list_erasures(self) -> list[dict]:
        """What is applied; see `salun_diffusion.list_erasures`."""
        return loader.list_erasures(self)

    def fuse_erasure(self) -> None:
        """Makes what is applied permanent; see `salun_diffusion.fuse_erasure`."""
        loader.fuse_erasure(self)


class SavedAsStock(Erasures):
    """The same for a class right below diffusers' own, whose name its saved config gets: diffusers itself loads it."""

    def to_json_string(self) -> str:
        """The config as it is saved."""
        import json

        stock = next(kind for kind in type(self).__mro__ if kind.__module__.startswith("diffusers."))
        config = json.loads(super().to_json_string())
        return json.dumps(config | {"_class_name": stock.__name__}, indent=2, sort_keys=True) + "\n"
