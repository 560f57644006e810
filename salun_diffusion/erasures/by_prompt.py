"""SPM's "facilitated transport" (Lyu et al., CVPR 2024): an adapter as strong as each prompt is near the concept.

As the authors' code computes it, for a prompt p and each name c of the concept ::

    scale = max over c of max(cos(E(p), E(c)), |T(p) ∩ T(c)| / |T(c)|)

E is what the denoiser attends to, the text encoder's states at all places of the padded prompt, as one vector; T the
set of the tokens without start, end and padding. Nothing is rescaled or cut off. With guidance the rows of the negative
prompts have the scale of their picture's prompt, whatever they say themselves, since there the whole network has it.
The code scales both factors of an adapter, so that it acts with the *square* of the scale, and adds up the factors of
several before it multiplies A by B; here each adapter acts with its own scale once, and what they do adds up.
"""

import threading

import torch

from ..errors import SalunError
from ..guards.base import Call, Watch, need_prompts
from ..models.text_unet import TextUNet, encode, token_ids


def check_scalable(pipe, what: str, instead: str) -> None:
    """Pass if adapters on this pipeline can be scaled by prompt.

    Raises:
        SalunError: they cannot; the message begins with ``what``, and says what to do ``instead``.
    """
    if not TextUNet.accepts(pipe):
        raise SalunError(
            f"{what} scales the adapter by prompt, as can be done for Stable Diffusion 1.x, 2.x and XL, pipelines with "
            f"CLIP's text encoders, a U-Net and encode_prompt(), which {type(pipe).__name__} is not: {instead}."
        )


@torch.no_grad()
def prompt_scales(pipe, prompts: list[str], names: list[str]) -> torch.Tensor:
    """How near each of ``prompts`` is to the concept of these ``names``: float32 ``(len(prompts),)``, of 0 to 1."""
    texts = list(dict.fromkeys([*prompts, *names]))
    states = dict(zip(texts, encode(pipe, texts)["encoder_hidden_states"].float().flatten(1), strict=True))
    tokens = {text: {*token_ids(pipe, text)} - {*pipe.tokenizer.all_special_ids} for text in texts}

    def nearness(prompt: str, name: str) -> float:
        shared = len(tokens[prompt] & tokens[name]) / max(len(tokens[name]), 1)
        return max(float(torch.cosine_similarity(states[prompt], states[name], dim=0)), shared)

    return torch.tensor([max(nearness(prompt, name) for name in names) for prompt in prompts])


class ByPrompt:
    """What a pipeline's session wears for one adapter.

    Args:
        names: of the concept.

    Attributes:
        on: whether its erasure's scale is another than 0, at which it is not asked.
    """

    on = True

    def __init__(self, names: list[str]):
        self.names, self.here = names, threading.local()  # threads may draw at the same time

    def put_on(self, layers: list[torch.nn.Module], adapter: str) -> None:
        """Scale what ``adapter`` adds in peft's ``layers``, for as long as it is there."""
        self.layers, self.adapter = layers, adapter
        for layer in layers:
            layer.lora_B[adapter].register_forward_hook(self._scale)

    def watch(self, call: Call) -> Watch:
        """Find the scales of a call's pictures; there is nothing else to watch."""
        if any(self.adapter in layer.merged_adapters for layer in self.layers):
            raise SalunError(
                "An adapter that is scaled by prompt was fused with the weights by fuse_lora(), which acts at full "
                "strength on every prompt: call pipe.unfuse_lora() first."
            )
        prompts = need_prompts(call, "An adapter that is scaled by prompt")
        self.here.scales = prompt_scales(call.pipe, prompts, self.names)
        return Watch()

    def _scale(self, module, args, output: torch.Tensor) -> torch.Tensor:
        if not self.on:
            return output
        scales = self.here.scales.to(output)  # of the pictures; the rows are theirs in turn, once for each condition
        return output * scales.repeat(len(output) // len(scales)).view(-1, *[1] * (output.ndim - 1))
