"""What a guard is: settings and the phrases of a concept; and, for each call of the pipeline, a watch over it.

A watch sees the steps of the call one after the other. It may move the prompt's embeddings before the network predicts,
have the network predict for one more prompt beside, move what an attention block gives, move the conditional
prediction, and move the latents before the scheduler's step. What several watches do is added up, each times its
erasure's scale, so their order does not matter.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import Transformer2DModel

from ..errors import SalunError
from ..models.base import Condition
from ..models.load import denoiser


@dataclass(frozen=True)
class Call:
    """One call of a pipeline.

    Attributes:
        pipe: the diffusers pipeline.
        prompts: one for each picture; None where the caller gave embeddings in their place.
        negative_prompts: one for each picture, "" where none was given.
        embeddings: of the prompts' tokens, ``(pictures, tokens, width)``, as the network gets them.
        num_inference_steps: denoising steps.
    """

    pipe: Any
    prompts: list[str] | None
    negative_prompts: list[str]
    embeddings: torch.Tensor
    num_inference_steps: int


@dataclass(frozen=True)
class Step:
    """What the network predicted at one step, each ``(pictures, channels, height, width)``.

    Attributes:
        number: from 0.
        timestep: of the schedule.
        conditional: by the prompts.
        unconditional: by the negative prompts, or empty ones; None where nobody wants it and nothing is guided.
        beside: by what :meth:`Watch.beside` asked for, or None.
    """

    number: int
    timestep: float
    conditional: torch.Tensor
    unconditional: torch.Tensor | None
    beside: torch.Tensor | None


class Watch:
    """A guard during one call; what it remembers from step to step ends with that."""

    wants_unconditional = False  # whether Step.unconditional is wanted of a call without guidance too

    def prompt_change(self, number: int) -> torch.Tensor | None:
        """What is added to the embeddings of the prompts' tokens at step ``number``, of their shape; or None."""
        return None

    def empty_change(self, number: int) -> torch.Tensor | None:
        """The same for the negative prompts; asked only where there is guidance."""
        return None

    def beside(self, number: int) -> Condition | None:
        """A condition, one row a picture or one for all, that the network is to predict for at step ``number`` too."""
        return None

    def skip_features(
        self, number: int, block: int, guarded: torch.Tensor, beside: torch.Tensor
    ) -> torch.Tensor | None:
        """What replaces the prompts' rows of a skip connection into the up-sampling block ``block`` (0 and 1 are asked,
        where there is something :meth:`beside`), ``(pictures, channels, height, width)``; or None.
        """
        return None

    def block_change(self, timestep: float, block: str, features: torch.Tensor) -> torch.Tensor | None:
        """What is added to the output of an attention block at a step; or None.

        Args:
            timestep: of the schedule.
            block: its name within the denoiser, as :func:`attention_blocks` has it.
            features: ``(rows, channels, height, width)``, of the prompts and, with guidance, of the negative ones.
        """
        return None

    def prediction_change(self, step: Step) -> torch.Tensor | None:
        """What is added to the conditional prediction; or None."""
        return None

    def latent_change(
        self, number: int, timestep: float, latents: torch.Tensor, predicted: torch.Tensor
    ) -> torch.Tensor | None:
        """What is added to the latents that the scheduler's step starts from; or None.

        Args:
            number: of the step, from 0.
            timestep: of the schedule.
            latents: ``(pictures, channels, height, width)``, as the scheduler keeps them.
            predicted: for them, guided, of the same shape.
        """
        return None


class Guard:
    """A guard as its file has it; it holds nothing of any call.

    What it learns from the base model before its first use is in :attr:`tensors`, by the names in :attr:`learned`.

    Args:
        options: of :attr:`Options`.
        phrases: what to keep from being drawn, in words.
    """

    title: str  # for messages
    Options: type  # a dataclass of `option` fields
    fits_two_encoders = True  # whether it can guard Stable Diffusion XL
    wants_prompts = False  # whether its phrases are, beside a concept's names, the plain prompts that ask for it
    learned: tuple[str, ...] = ()

    def __init__(self, options: Any, phrases: list[str]):
        self.options, self.phrases = options, phrases
        self.tensors: dict[str, torch.Tensor] = {}

    def learn(self, pipe, prompts: list[str], others: list[str], seed: int) -> None:
        """Fill :attr:`tensors`, float32; called once, where the guard is made.

        Args:
            pipe: the base model's pipeline.
            prompts: of the concept, distinct; none where nothing is in :attr:`learned`.
            others: of the rest, likewise.
            seed: fixes everything that is random.

        Raises:
            SalunError: the guard would not work with this pipeline.
        """

    def check_learned(self, pipe, what: str) -> None:
        """Pass if what it learned is of use to this pipeline; ``what`` as in :meth:`check_fit`.

        Raises:
            SalunError: it is not.
        """

    def watch(self, call: Call) -> Watch:
        """The watch over a call that begins.

        Raises:
            SalunError: the call is none that it can guard.
        """
        raise NotImplementedError

    @classmethod
    def check_fit(cls, pipe, what: str) -> None:
        """Pass if it can guard this pipeline.

        Args:
            pipe: the diffusers pipeline.
            what: how the message begins, such as "--method sld".

        Raises:
            SalunError: it cannot.
        """
        from ..models.text_unet import TextUNet

        known = "Stable Diffusion 1.x, 2.x and XL" if cls.fits_two_encoders else "Stable Diffusion 1.x and 2.x"
        if not TextUNet.accepts(pipe) or (hasattr(pipe, "text_encoder_2") and not cls.fits_two_encoders):
            raise SalunError(
                f"{what} is a guard for {known}, pipelines with a U-Net and encode_prompt(), which "
                f"{type(pipe).__name__} is not: choose another method or model."
            )


def attention_blocks(pipe) -> dict[str, torch.nn.Module]:
    """The blocks of a U-Net that attend to the prompt, by their names in it, such as ``up_blocks.1.attentions.1``."""
    return {name: part for name, part in denoiser(pipe).named_modules() if isinstance(part, Transformer2DModel)}


def need_prompts(call: Call, title: str) -> list[str]:
    """The call's prompts.

    Raises:
        SalunError: embeddings were given in their place.
    """
    if call.prompts is None:
        raise SalunError(f"{title} reads the prompt's words, and embeddings were given in their place: give prompts.")
    return call.prompts
