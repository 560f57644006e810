"""Base models, one family a file: what a method may ask of one is in ``base.py``. A new family is a subclass of
``Model`` in a file of its own and a line in ``FAMILIES``.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import SalunError
from .complete import check_weights

if TYPE_CHECKING:
    from .base import Model

FAMILIES = {
    "identities": "salun_diffusion.models.identities.Identities",  # Arc2Face; before the family whose pipeline it has
    "text_unet": "salun_diffusion.models.text_unet.TextUNet",  # Stable Diffusion 1.x, 2.x, XL
    "pixart_sigma": "salun_diffusion.models.cross_dit.PixArtSigma",
    "sana": "salun_diffusion.models.cross_dit.Sana",
    "sd3": "salun_diffusion.models.mmdit.SD3",  # Stable Diffusion 3 and 3.5
    "flux": "salun_diffusion.models.mmdit.Flux",  # dev and schnell
    "label_unet": "salun_diffusion.models.labels.LabelUNet",  # class-conditional U-Nets on pixels
    "dit": "salun_diffusion.models.labels.DiT",  # DiT, class-conditional on latents
}


def model_of(pipe) -> "Model":
    """The loaded diffusers pipeline ``pipe`` as a model of the first family that accepts it.

    Raises:
        SalunError: no family does.
    """
    for path in FAMILIES.values():
        module, name = path.rsplit(".", 1)
        family = getattr(import_module(module), name)
        if family.accepts(pipe):
            return family(pipe)
    raise SalunError(
        f"{type(pipe).__name__} is of no known family of base models ({', '.join(FAMILIES)}): give a Stable Diffusion "
        "1.x, 2.x, XL or 3, PixArt-Sigma, Sana, Flux or DiT pipeline, or a class-conditional UNet2DModel."
    )


def load_model(name: str, revision: str | None = None, dtype=None, variant: str | None = None) -> "Model":
    """:func:`salun_diffusion.models.load.load_pipeline`, then :func:`model_of`."""
    from .load import load_pipeline

    pipe = load_pipeline(name, revision, dtype, variant)
    check_weights(name, pipe)
    return model_of(pipe)
