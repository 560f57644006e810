"""The text encoder of a pipeline with a way in for token embeddings of one's own, and gradients through it."""

import re

import torch
from diffusers import DiffusionPipeline
from transformers import CLIPTextModel

from salun_diffusion.errors import SalunError
from salun_diffusion.models.base import Condition


class Text:
    """A CLIP text encoder and its tokenizer.

    Attributes:
        table: the embedding of each token, ``(vocabulary, width)``, fp32.
        length: tokens in a sequence, start and end marks and padding included.
        special: ids that stand for no text.

    Raises:
        SalunError: the pipeline has no such encoder, or two.
    """

    def __init__(self, pipe: DiffusionPipeline, dtype: torch.dtype):
        encoder = getattr(pipe, "text_encoder", None)
        if not isinstance(encoder, CLIPTextModel) or getattr(pipe, "text_encoder_2", None) is not None:
            raise SalunError(
                f"{type(pipe).__name__} has not one text encoder, CLIP's: attacks on the text are for Stable Diffusion "
                "1.x and 2.x; those without text (tina, noise_probe) work on it."
            )
        self.encoder, self.tokenizer, self.dtype = encoder, pipe.tokenizer, dtype
        self._embedding = encoder.get_input_embeddings()
        self.table = self._embedding.weight.detach().float()
        self.length = pipe.tokenizer.model_max_length
        self.special = {*pipe.tokenizer.all_special_ids}

    def ids(self, prompts: list[str]) -> torch.Tensor:
        """Token ids ``(n, length)``, padded as the pipeline pads, and cut."""
        found = self.tokenizer(
            prompts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        return found.input_ids.to(self.table.device)

    def encode(self, embeddings: torch.Tensor) -> Condition:
        """The condition of token embeddings ``(n, length, width)`` in place of those of a text; differentiable."""
        values = embeddings.to(self._embedding.weight.dtype)
        hook = self._embedding.register_forward_hook(lambda module, given, found: values)
        try:
            ids = torch.full(embeddings.shape[:2], self.tokenizer.eos_token_id, device=self.table.device)
            return {"encoder_hidden_states": self.encoder(ids)[0].to(self.dtype)}
        finally:
            hook.remove()

    def words(self, ids: torch.Tensor) -> str:
        """The text of tokens ``(n,)``, special ones left out."""
        return " ".join(self.tokenizer.decode([i for i in ids.tolist() if i not in self.special]).split())

    def between(self, prompt: str, words: list[str]) -> list[str]:
        """The parts of ``prompt`` before, between and after whichever of ``words`` stand in it."""
        if not words:
            return [prompt.strip()]
        found = re.split(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", prompt, flags=re.IGNORECASE)
        return [part.strip() for part in found]

    def with_slots(self, prompt: str, words: list[str], count: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids ``(length,)`` of ``prompt`` with ``count`` free places for the first of ``words`` in it (at its
        beginning, where it names none or none are given; other mentions are left out), and a mask of those places.
        """
        first, *rest = self.between(prompt, words)
        rest, first = (rest, first) if rest else ([first], "")
        plain = [self.tokenizer(part, add_special_tokens=False).input_ids for part in (first, " ".join(rest).strip())]
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        pad = self.tokenizer.pad_token_id
        ids = [start, *plain[0], *[end] * count, *plain[1]][: self.length - 1] + [end]
        free = torch.zeros(self.length, dtype=torch.bool)
        free[1 + len(plain[0]) : 1 + len(plain[0]) + count] = True
        if not free[: len(ids) - 1].sum() == count:
            raise SalunError(f"The prompt '{prompt}' leaves no room for {count} tokens more: attack a shorter one.")
        ids += [pad] * (self.length - len(ids))
        return torch.tensor(ids, device=self.table.device), free.to(self.table.device)
