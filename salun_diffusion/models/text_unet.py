"""Stable Diffusion 1.x, 2.x and XL: a U-Net on latents that attends to the tokens of a prompt.

Their condition holds ``encoder_hidden_states`` ``(batch, tokens, width)``; for SDXL also ``text_embeds`` (pooled) and
``time_ids`` (a picture of the pipeline's own size, not cropped).
"""

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from ..errors import SalunError
from .base import Condition
from .latents import LatentModel
from .load import WORN, denoiser

PLACE = "*"  # in a prompt, it stands for a word of one's own: one token of CLIP's vocabulary, and no word
ADDED = ("text_embeds", "time_ids")  # what SDXL's U-Net takes as added_cond_kwargs


class TextUNet(LatentModel):
    """One text encoder (SD 1.x, 2.x) or two (SDXL), a ``UNet2DConditionModel``, an autoencoder."""

    capabilities = frozenset({"text", "cross-attention", "embeddings", "words", "pictures", "diffusion"})

    def __init__(self, pipe):
        super().__init__(pipe)
        self._empty: tuple | None = None
        if len(text_encoders(pipe)) == 1:
            self.capabilities = self.capabilities | {"one text encoder"}
        takes, latent = self.network.config.in_channels, pipe.vae.config.latent_channels
        if takes != latent:  # inpainting (9), depth (5), instructed editing (8): they need a picture beside the prompt
            raise SalunError(
                f"The U-Net takes {takes} channels, not the {latent} of a latent, as those for inpainting and editing "
                "do: train and measure an erasure on the text-to-image model, and put it onto this one by "
                "load_erasure(pipe, file, check_base=False)."
            )

    @classmethod
    def accepts(cls, pipe):
        known = isinstance(denoiser(pipe), UNet2DConditionModel)
        return known and hasattr(pipe, "tokenizer") and hasattr(pipe, "encode_prompt") and hasattr(pipe, "vae")

    def encode(self, prompts):
        return encode(self.pipe, prompts)

    @property
    def empty(self):
        worn = [getattr(encoder, WORN, None) for _, encoder in text_encoders(self.pipe)]
        # an erasure of the text encoder gives another one; of encoders that were dropped the last one stays
        if self._empty is None or (worn and self._empty[0] != worn):
            self._empty = worn, encode_empty(self.pipe)
        return self._empty[1]

    def forward(self, noisy, timesteps, condition):
        return self.network(noisy, timesteps, return_dict=False, **arguments(condition))[0]

    def tokens(self, condition: Condition) -> torch.Tensor:
        """The embedding of each token as the attention layers get it, ``(batch, tokens, width)``."""
        return self.embeddings(condition)

    def word_tables(self) -> list[torch.Tensor]:
        """The embedding of every token of the vocabulary, ``(vocabulary, width)``, of each text encoder."""
        return [encoder.get_input_embeddings().weight.detach() for _, encoder in text_encoders(self.pipe)]

    def encode_now(self, prompts: list[str]) -> Condition:
        """The conditions of a few ``prompts``, where the network is, with a gradient to the text encoder's weights."""
        return {key: self.moved(value) for key, value in _encode(self.pipe, prompts).items()}

    def behind_word(self, prompt: str) -> str:
        """``prompt`` with ``PLACE`` before it, for :meth:`encode_words`."""
        return f"{PLACE} {prompt}"

    def opened(self, prompt: str, other: str) -> str:
        """``prompt`` with ``PLACE`` for the tokens that ``other`` has not."""
        ids, differing = token_ids(self.pipe, prompt), self.differing_tokens(prompt, other)
        before, after = (
            self.pipe.tokenizer.decode(part) for part in (ids[1 : differing.start], ids[differing.stop : -1])
        )
        return " ".join(f"{before} {PLACE} {after}".split())

    def encode_words(self, prompts: list[str], words: list[torch.Tensor]) -> Condition:
        """The conditions of a few ``prompts`` in which ``PLACE`` is a word of one's own, where the network is, with a
        gradient to the words.

        Args:
            prompts: made by :meth:`opened`.
            words: for each text encoder the token embedding of each prompt's word, ``(len(prompts), width)``.

        Raises:
            SalunError: a tokenizer that has no token for ``PLACE``.
        """
        hooks = []
        try:
            for (tokenizer, encoder), word in zip(text_encoders(self.pipe), words, strict=True):
                hooks.append(encoder.get_input_embeddings().register_forward_hook(_putting(tokenizer, word)))
            return self.encode_now(prompts)
        finally:
            for hook in hooks:
                hook.remove()

    def differing_tokens(self, prompt: str, other: str) -> slice:
        """As :func:`differing_tokens`."""
        return differing_tokens(self.pipe, prompt, other)

    def token_count(self, prompt: str) -> int:
        """How many tokens the encoder reads of ``prompt``, its start and end marks included."""
        return len(token_ids(self.pipe, prompt))


@torch.no_grad()
def encode(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, torch.Tensor]:
    """``prompts`` as the pipeline itself would encode them, ``(len(prompts), …)`` each, in its dtype, on the CPU.

    ``encoder_hidden_states`` always; for SDXL also ``text_embeds`` (pooled) and ``time_ids`` (a picture of the
    pipeline's own size, not cropped).

    Raises:
        SalunError: a pipeline whose text encoders are not of these two kinds.
    """
    parts = [_encode(pipe, prompts[i : i + 64]) for i in range(0, len(prompts), 64)]
    return {key: torch.cat([part[key] for part in parts]).cpu() for key in parts[0]}


def encode_empty(pipe: DiffusionPipeline) -> dict[str, torch.Tensor]:
    """The unconditional side of classifier-free guidance, a batch of one: the empty prompt, or for most SDXL models
    zeros.
    """
    empty = encode(pipe, [""])
    if getattr(pipe.config, "force_zeros_for_empty_prompt", False):
        empty |= {key: torch.zeros_like(empty[key]) for key in ("encoder_hidden_states", "text_embeds")}
    return empty


def arguments(text: dict[str, torch.Tensor]) -> dict:
    """The denoiser's keyword arguments."""
    added = {key: text[key] for key in ADDED if key in text}
    return {"encoder_hidden_states": text["encoder_hidden_states"]} | ({"added_cond_kwargs": added} if added else {})


def differing_tokens(pipe: DiffusionPipeline, prompt: str, other: str) -> slice:
    """The places of the tokens of ``prompt`` that ``other`` has not: what stays between their common beginning and
    their common end. Of a concept's prompt and its anchor's: the concept's words (and their article, if it differs).
    """
    return difference(token_ids(pipe, prompt), token_ids(pipe, other))


def difference(one: list[int], two: list[int]) -> slice:
    """The places of the tokens of ``one`` that ``two`` has not, as :func:`differing_tokens` counts them."""
    start = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    same = next((i for i, (a, b) in enumerate(zip(one[::-1], two[::-1], strict=False)) if a != b), 0)
    # where one prompt merely repeats or adds a word, the common parts overlap: its last common token stands for it
    stop = max(len(one) - min(same, min(len(one), len(two)) - start), start)
    return slice(min(start, stop - 1), stop)


def token_ids(pipe: DiffusionPipeline, prompt: str) -> list[int]:
    """The prompt's tokens with their start and end marks, cut to what the encoder reads, without padding."""
    return pipe.tokenizer(prompt, truncation=True, max_length=pipe.tokenizer.model_max_length).input_ids


def text_encoders(pipe: DiffusionPipeline) -> list[tuple]:
    """Each text encoder with its tokenizer, the tokenizer first."""
    pairs = [(getattr(pipe, f"tokenizer{n}", None), getattr(pipe, f"text_encoder{n}", None)) for n in ("", "_2")]
    return [(tokenizer, encoder) for tokenizer, encoder in pairs if encoder is not None]


def _putting(tokenizer, word: torch.Tensor):
    """A hook of an embedding layer that puts each prompt's row of ``word`` where its ``PLACE`` is."""
    place = tokenizer(PLACE, add_special_tokens=False).input_ids
    if len(place) != 1:
        raise SalunError(f"The tokenizer has no token of its own for '{PLACE}', in whose place words are searched.")

    def put(module, given, found):
        where = (given[0] == place[0])[..., None]
        return torch.where(where, word[:, None].to(found), found)

    return put


def _encode(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, torch.Tensor]:
    parts = {name for name in pipe.components if name.startswith("text_encoder") and getattr(pipe, name) is not None}
    # where the encoders are: during a training not where the network is, which is what pipe.device says
    options = {"device": pipe.text_encoder.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    if parts == {"text_encoder"}:
        return {"encoder_hidden_states": pipe.encode_prompt(prompts, **options)[0]}
    if parts == {"text_encoder", "text_encoder_2"} and getattr(pipe, "unet", None) is not None:
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, **options)
        side = pipe.default_sample_size * pipe.vae_scale_factor
        ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32).expand(len(prompts), 6)
        return {"encoder_hidden_states": embeds, "text_embeds": pooled, "time_ids": ids.to(embeds.device)}
    raise SalunError(
        f"{type(pipe).__name__} has the text encoders {sorted(parts)}; models with one (SD 1.x, 2.x), or with two and "
        "a U-Net (SDXL), can be erased."
    )
