"""Concept Steerers (Kim & Ghadiyaram, arXiv:2501.19066), after the authors' code for Stable Diffusion 1.4."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..errors import SalunError
from ..models.text_unet import encode
from ..options import option
from .base import Guard, Watch, need_prompts
from .sae import SparseAutoencoder, train

DEPTH = 0.75  # of the layer among the text encoder's: layer 9 of 12, counted from 0, as published


@dataclass(frozen=True)
class ConceptSteerersOptions:
    """How far the prompts are steered, and the sparse autoencoder."""

    phrases: str = option("", "what to keep away from, in words, with commas; the concept's names unless given")
    strength: float = option(0.5, "of the steering away from it; 0.5 published for nudity, 0.7 for violence", least=0)
    expansion: int = option(4, "latents of the sparse autoencoder for each feature of the text encoder", least=1)
    active: int = option(32, "latents that a token may use in its training (k)", least=1)
    train_steps: int = option(500, "of its training", least=0)
    rate: float = option(4e-4, "its learning rate", least=0)
    batch_tokens: int = option(512, "tokens in a batch of its training; 4096 in the authors' code", least=1)


class ConceptSteerers(Guard):
    """Prompts steered away from a concept by the latents of a sparse autoencoder (k-SAE) within the text encoder.

    The autoencoder is trained here, on what a layer of the text encoder gives for the tokens of prompts. With its
    latents of a phrase's tokens, ReLU(E (x − b) + c), of which now all may be active, and the decoder's matrix D, a
    layer's output h at each position is moved ::

        v = mean over phrases of D ReLU(E (x − b) + c);   h ← h − strength · v of a prompt, h + strength · v of the
        negative or empty prompt

    The file keeps v alone, ``(tokens, width)``: the autoencoder is of no further use. The released code compares the
    reconstruction, which has b in it, with x − b: here with x. Its auxiliary loss for latents that never act is left
    out, and its decoder is scaled to unit norm at the start alone, as here. Prompts are of the concept and of its
    surroundings, where the authors take I2P's; several phrases are our own addition.
    """

    title = "Concept Steerers"
    Options = ConceptSteerersOptions
    fits_two_encoders = False
    learned = ("direction",)

    def learn(self, pipe, prompts, others, seed):
        options = self.options
        with torch.no_grad():
            tokens = features(pipe, list(dict.fromkeys([*prompts, *others]))).flatten(0, 1)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            autoencoder = SparseAutoencoder(tokens.shape[1], options.expansion * tokens.shape[1], options.active)
            train(autoencoder, tokens, options.train_steps, options.rate, options.batch_tokens)
        with torch.no_grad():
            latents = autoencoder.latents(features(pipe, self.phrases)).relu()
            self.tensors = {"direction": (latents @ autoencoder.decoder.T).mean(0)}

    def check_learned(self, pipe, what):
        config = pipe.text_encoder.config
        fits, found = (config.max_position_embeddings, config.hidden_size), tuple(self.tensors["direction"].shape)
        if found != fits:
            this, its = (" x ".join(map(str, shape)) for shape in (fits, found))
            raise SalunError(
                f"{what} steers a text encoder of {its} (tokens, width), and this pipeline's has {this}: make the "
                "guard anew with this model as the base."
            )

    def watch(self, call):
        prompts = need_prompts(call, self.title)
        move = -self.options.strength * self.tensors["direction"]
        return ConceptSteerersWatch(
            *(steered(call.pipe, *each) for each in ((prompts, move), (call.negative_prompts, -move)))
        )


class ConceptSteerersWatch(Watch):
    """The same change at every step."""

    def __init__(self, prompts: torch.Tensor, negative_prompts: torch.Tensor):
        self.changes = prompts, negative_prompts

    def prompt_change(self, number):
        return self.changes[0]

    def empty_change(self, number):
        return self.changes[1]


def layer_of(pipe) -> torch.nn.Module:
    """The layer of the text encoder that is steered."""
    encoder = pipe.text_encoder
    layers = getattr(encoder, "text_model", encoder).encoder.layers  # transformers 5 has no text_model between
    return layers[int(DEPTH * len(layers))]


@contextmanager
def hooked(pipe, hook):
    """``hook(hidden)``, the layer's output ``(batch, tokens, width)``, gives another one, or None, while this lasts."""

    def act(module, given, output):
        whole = isinstance(output, torch.Tensor)
        changed = hook(output if whole else output[0])
        return None if changed is None else changed if whole else (changed, *output[1:])

    handle = layer_of(pipe).register_forward_hook(act)
    try:
        yield
    finally:
        handle.remove()


def features(pipe, prompts: list[str]) -> torch.Tensor:
    """What the layer gives for the tokens of prompts, float32 on the CPU, ``(prompts, tokens, width)``."""
    seen = []
    with hooked(pipe, lambda hidden: seen.append(hidden.detach().float().cpu())):
        encode(pipe, prompts)
    return torch.cat(seen)


def steered(pipe, prompts: list[str], move: torch.Tensor) -> torch.Tensor:
    """How the embeddings of prompts change where the layer's output is moved, ``(prompts, tokens, width)``."""
    distinct = list(dict.fromkeys(prompts))
    plain = encode(pipe, distinct)["encoder_hidden_states"]
    with hooked(pipe, lambda hidden: hidden + move.to(hidden)):
        change = encode(pipe, distinct)["encoder_hidden_states"] - plain
    return change[[distinct.index(prompt) for prompt in prompts]]
