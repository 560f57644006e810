"""SAeUron (Cywiński & Deja, ICML 2025, arXiv:2501.18052), after the paper and the authors' code for one model, Stable
Diffusion as UnlearnCanvas fine-tuned it.
"""

from dataclasses import dataclass

import torch

from ..concepts.concept import Row
from ..errors import SalunError
from ..files import listed
from ..models.sampling import sample
from ..options import option
from .base import Guard, Watch, attention_blocks
from .sae import SparseAutoencoder, train

SUM = 1e-8  # added to what a score divides by: a step at which no latent acts has scores of 0
BATCHES = 16  # of the training's size, over which the latents' threshold is averaged
AT_ONCE = 8  # pictures drawn at once to learn from


@dataclass(frozen=True)
class SAeUronOptions:
    """What it learns from, the sparse autoencoder, and how its features are chosen and blocked."""

    phrases: str = option("", "prompts that ask for the concept, with commas; those of its templates unless given")
    block: str = option(
        "up_blocks.1.attentions.1",
        "attention block of the denoiser whose output is looked at; published for objects, .2 at the end for styles",
    )
    multiplier: float = option(
        -10.0, "of the features that are blocked (γ); −1 published for styles, −1 to −30 for objects"
    )
    percentile: float = option(
        99.99,
        "of scores above which a feature is blocked; 99.999 published for styles, 99.99 or more for objects",
        least=0,
    )
    pictures: int = option(32, "drawn of the concept, and as many of the rest, to learn from", least=1)
    steps: int = option(20, "denoising steps of these pictures; 100 published", least=1)
    guidance: float = option(9.0, "guidance scale of these pictures")
    places: int = option(64, "of each feature map to learn from, drawn at random; all in the authors' code", least=1)
    expansion: int = option(16, "latents of the sparse autoencoder for each channel of the block", least=1)
    active: int = option(32, "latents that a place may use in its training, on average (k)", least=1)
    train_steps: int = option(500, "of its training", least=0)
    rate: float = option(4e-4, "its learning rate at the start, from where it falls to 0 linearly", least=0)
    batch_places: int = option(4096, "places in a batch of its training", least=1)


class SAeUron(Guard):
    """Features of an attention block that mean the concept, turned into their negative while the network draws.

    A sparse autoencoder x ≈ D f(x) + b (BatchTopK) is trained on what the block gives at the places x of its maps, over
    all steps of pictures of the concept and of the rest. With μ_i the mean of latent f_i at a step, over pictures and
    places, latent i is one of the concept's features at that step if ::

        score_i = μ_i(concept) / Σ_j μ_j(concept) − μ_i(rest) / Σ_j μ_j(rest)

    is above the ``percentile`` of all latents' scores (and above 0); and wherever f_i > μ_i(rest) while drawing ::

        f_i ← multiplier · μ_i(concept) · f_i,   x ← x + Σ_i d_i · (its change)

    which is the released hook: what the autoencoder does not explain of x is added back, so only the changes count; it
    acts on the prompts' rows and the negative prompts'. From code and paper: block, scores, factor, BatchTopK and its
    sizes, a rate that falls to 0, decoder columns of length one, learning from the prompts' rows alone.

    Our own: in place of the k greatest latents of each place, for which the file would have to hold the whole
    autoencoder, a latent acts above a threshold, the mean over batches of the least that BatchTopK keeps. The rest's
    mean is that of prompts with any other words; the authors average over a list of concepts, this one among them.
    Steps are known by their timestep, the nearest of those that were learned, not by their number, so any number of
    them may be drawn. The bias b starts at the mean (their geometric median); gradients are neither clipped nor
    projected, and the auxiliary loss for latents that never act is left out. Several concepts in one guard are scored
    as one.

    The file keeps of the chosen features the encoder's rows, the decoder's columns, ``(features, width)`` each, a bias;
    and ``(steps, features)`` their means for the concept, 0 where one is not chosen, and what they must exceed.
    """

    title = "SAeUron"
    Options = SAeUronOptions
    learned = ("encoder", "bias", "decoder", "means", "gates", "timesteps")

    def learn(self, pipe, prompts, others, seed):
        options, block = self.options, self.block_of(pipe, self.title)
        if options.percentile > 100:
            raise SalunError(f"percentile is {options.percentile:g}: give one from 0 to 100.")
        asked = self.phrases if options.phrases else prompts
        concept, rest = (activations(pipe, block, each, options, seed) for each in (asked, others))
        x, width = torch.cat([concept, rest], 1).flatten(0, 1), block.out_channels
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            autoencoder = SparseAutoencoder(width, options.expansion * width, options.active, of_batch=True)
            autoencoder.bias.data.copy_(x.mean(0))
            autoencoder.to(next(block.parameters()).device)
            train(autoencoder, x, options.train_steps, options.rate, options.batch_places, falling=True)
            threshold = threshold_of(autoencoder, x, options.batch_places)
        self.tensors = features_of(autoencoder, concept, rest, threshold, options.percentile)
        self.tensors["timesteps"] = pipe.scheduler.timesteps.float().cpu()

    def check_learned(self, pipe, what):
        width, its = self.tensors["encoder"].shape[-1], self.block_of(pipe, what).out_channels
        if width != its:
            raise SalunError(
                f"{what} changes {width} channels of the block '{self.options.block}', which gives {its} here: make "
                "the guard anew with this model as the base."
            )

    def block_of(self, pipe, what: str) -> torch.nn.Module:
        """The block that it acts in; ``what`` begins the message of the SalunError where there is none."""
        blocks, name = attention_blocks(pipe), self.options.block
        if name not in blocks:
            raise SalunError(
                f"{what} acts in the attention block '{name}', which this denoiser lacks; it has {listed(blocks)}: "
                "make the guard with --block and one of these."
            )
        return blocks[name]

    def watch(self, call):
        return SAeUronWatch(self)


class SAeUronWatch(Watch):
    """The same at every step of its timestep, whatever the prompt."""

    def __init__(self, guard: SAeUron):
        self.guard = guard

    def block_change(self, timestep, block, features):
        if block != self.guard.options.block:
            return None
        dtype = torch.promote_types(features.dtype, torch.float32)
        learned = {name: tensor.to(features.device, dtype) for name, tensor in self.guard.tensors.items()}
        step = (learned["timesteps"] - timestep).abs().argmin()
        means, gates = learned["means"][step], learned["gates"][step]
        latents = features.to(dtype).movedim(1, -1) @ learned["encoder"].T + learned["bias"]
        changes = (self.guard.options.multiplier * means - 1) * latents
        changes = torch.where((latents > gates) & (means > 0), changes, 0.0)
        return (changes @ learned["decoder"]).movedim(-1, 1)


def activations(pipe, block: torch.nn.Module, prompts: list[str], options, seed: int) -> torch.Tensor:
    """What the block gives for the prompts' rows while pictures of them are drawn, at some of its places, ``(steps,
    pictures · places, width)``, float32 on the CPU. The i-th picture's noise is of seed + i, whatever it shows.
    """
    generator, seen, parts = torch.Generator().manual_seed(seed), [], []
    rows = [Row(prompts[i % len(prompts)], None, {}, seed + i) for i in range(options.pictures)]

    def look(module, given, output):
        maps = output[0][-len(part) :].flatten(2).mT
        places = torch.randperm(maps.shape[1], generator=generator)[: options.places]
        seen.append(maps[:, places.to(maps.device)].flatten(0, 1).float().cpu())

    how = {"num_inference_steps": options.steps, "guidance_scale": options.guidance}
    handle = block.register_forward_hook(look)
    try:
        for start in range(0, len(rows), AT_ONCE):
            part = rows[start : start + AT_ONCE]
            sample(pipe, part, batch_size=AT_ONCE, output_type="latent", **how)
            parts.append(torch.stack(seen))
            seen.clear()
    finally:
        handle.remove()
    return torch.cat(parts, 1)


@torch.no_grad()
def threshold_of(autoencoder: SparseAutoencoder, x: torch.Tensor, batch: int) -> float:
    """The mean over batches of the least latent that BatchTopK keeps."""
    drawn = (x[torch.randint(len(x), (batch,))].to(autoencoder.bias) for _ in range(BATCHES))
    return float(torch.stack([autoencoder.least(autoencoder.latents(one)) for one in drawn]).mean())


@torch.no_grad()
def features_of(
    autoencoder: SparseAutoencoder, concept: torch.Tensor, rest: torch.Tensor, threshold: float, percentile: float
) -> dict[str, torch.Tensor]:
    """The tensors of a guard but for the timesteps, from activations ``(steps, rows, width)`` of both kinds.

    Raises:
        SalunError: no latent is more the concept's than the rest's.
    """
    means, gates = [], []
    for of_step in zip(concept, rest, strict=True):
        both = (autoencoder.latents(x.to(autoencoder.bias)) for x in of_step)
        wanted, other = (torch.where(latents > threshold, latents, 0.0).mean(0) for latents in both)
        score = wanted / (wanted.sum() + SUM) - other / (other.sum() + SUM)
        chosen = (score > score.quantile(percentile / 100)) & (score > 0)
        means.append(torch.where(chosen, wanted, 0.0))
        gates.append(other.clamp(min=threshold))
    mean, gate = torch.stack(means), torch.stack(gates)
    used = mean.any(0)
    if not used.any():
        raise SalunError(
            "SAeUron: no feature of its autoencoder acts more on the concept than on the rest: train it for longer "
            "(--train_steps), on more pictures, or lower --percentile."
        )
    encoder = autoencoder.encoder[used]
    found = {
        "encoder": encoder,
        "bias": autoencoder.latent_bias[used] - encoder @ autoencoder.bias,
        "decoder": autoencoder.decoder[:, used].T,
        "means": mean[:, used],
        "gates": gate[:, used],
    }
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}
