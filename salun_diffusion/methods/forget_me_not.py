"""Forget-Me-Not: Zhang et al., "Forget-Me-Not: Learning to forget in text-to-image diffusion models", 2023 (arXiv
2303.17591), attention re-steering.
"""

from dataclasses import dataclass

import torch
from diffusers.models.attention_processor import Attention

from ..options import option
from .base import NEEDS_RETAIN, GradientMethod


class Recorder:
    """An attention processor that computes the attention probabilities in the open and keeps them."""

    def __init__(self, maps: list[torch.Tensor]):
        self.maps = maps

    def __call__(self, attn: Attention, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        # diffusers' own plain processor does the same, but does not hand out the probabilities
        query = attn.to_q(hidden_states)
        if attention_mask is not None:  # a row for each head
            attention_mask = attn.prepare_attention_mask(attention_mask, attention_mask.shape[-1], len(hidden_states))
        if attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
        key, value = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        if attn.norm_q is not None:  # of all heads together: some Sana models
            query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (attn.head_to_batch_dim(part) for part in (query, key, value))
        probabilities = attn.get_attention_scores(query, key, attention_mask)
        if torch.is_grad_enabled():  # not for the pictures that are drawn between steps
            self.maps.append(probabilities.unflatten(0, (-1, attn.heads)))
        hidden = attn.batch_to_head_dim(torch.bmm(probabilities, value))
        return attn.to_out[1](attn.to_out[0](hidden)) / attn.rescale_output_factor


@dataclass(frozen=True)
class ForgetMeNotOptions:
    """Which tokens count as the concept's."""

    end_tokens: int = option(1, "1: the end of the prompt and the padding too (published); 0: its words alone")


class ForgetMeNot(GradientMethod):
    """No pixel of the concept's pictures is to attend to the concept's words: the squared cross-attention maps of their
    tokens, averaged over pixels, heads and layers.

    With ``end_tokens`` (as published) the end of the prompt and the padding count as the concept's: the text encoder
    tells them what came before. The published code minimises the root of the sum; Adam sees little difference.
    """

    title = "Forget-Me-Not"
    settings = {"max_train_steps": 35, "learning_rate": 2e-6, "train_batch_size": 1}
    Options = ForgetMeNotOptions
    has_anchor = False
    uses_retain = False
    needs = ("text", "cross-attention")
    ignores = NEEDS_RETAIN

    def __init__(self, model, options, batches):
        super().__init__(model, options, batches)
        self.maps: list[torch.Tensor] = []
        self.layers = [m for name, m in model.network.named_modules() if name.endswith("attn2")]
        self.before = [layer.processor for layer in self.layers]
        for layer in self.layers:
            layer.set_processor(Recorder(self.maps))

    def losses(self, forget, retain):
        self.maps.clear()
        self.predict(forget.noisy, forget.timesteps, forget.condition)
        found, words = list(self.maps), forget.tokens["concept"]
        words = (words | forget.tokens["end"] if self.options.end_tokens else words).float()
        self.maps.clear()
        loss = sum(attention_norm(attention, words) for attention in found) / len(found)
        return loss, loss.new_zeros(())

    def close(self):
        for layer, processor in zip(self.layers, self.before, strict=True):
            layer.set_processor(processor)


def attention_norm(attention: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """``‖A‖²`` over the tokens marked in ``words`` ``(batch, tokens)``, 0 or 1, averaged over everything else.

    Args:
        words: 0 or 1, ``(batch, tokens)``.
        attention: probabilities ``(batch, heads, pixels, tokens)``.
    """
    squares = attention.float().square() * words[:, None, None, :]
    return squares.sum() / (words.sum() * attention.shape[1] * attention.shape[2])
