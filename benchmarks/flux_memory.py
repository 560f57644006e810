"""What erasing from Flux holds in a GPU's memory, by accounting: no GPU is needed, and none was used.

As in :mod:`benchmarks.memory`, passes are replayed on tensors without content. Flux has 19 double and 38 single blocks,
and with activations recomputed each adds the same: passes through one and two of each kind tell what all of them take.
"""

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from salun_diffusion.masks.scope import scoped_parameters
from salun_diffusion.models.scopes import JOINT

from .config import BenchmarkConfig
from .memory import _drop, giga

DOUBLE, SINGLE = 19, 38
PICTURE, TEXT = 64 * 64, 512  # tokens of 1024 pixels, and of T5
ENCODERS = 4_762_310_656 + 123_060_480  # weights of T5 v1.1 XXL's encoder and of CLIP L's, by their own configs
SCOPES = {"cross-attention+resnets": (0.5, 0.1), "cross-attention": (0.5, 0.1)}


def flux_memory(config: BenchmarkConfig) -> dict:
    """GB at 1024 pixels in bf16, batch 1, with activations recomputed: by scope and density, of the frozen layers in
    bf16 and in int8, of the three stages of a run, one picture drawn at once.
    """
    passes, (autoencoder, decoding) = _passes(2), _decoding()
    with torch.device("meta"):
        network = FluxTransformer2DModel(guidance_embeds=True)
    total, found = sum(p.numel() for p in network.parameters()), {}
    for scope, densities in SCOPES.items():
        trained = {name: p.numel() for name, p in scoped_parameters(network, scope, JOINT).items()}
        layers = {name.rpartition(".")[0] for name in trained}
        # int8: a byte for each weight of a frozen linear layer, and a scale in bf16 for each of its outputs
        saved = sum(
            layer.weight.numel() - 2 * layer.out_features
            for name, layer in network.named_modules()
            if isinstance(layer, torch.nn.Linear) and name not in layers
        )
        for frozen, weights in (("bf16", 2 * total), ("int8", 2 * total - saved)):
            what, parts = f"{scope}, frozen layers {frozen}", {"weights": weights}
            # the encoders in bf16, and the autoencoder in fp32, which needs more for a picture than a denoising step
            beside = {"encoders": 2 * ENCODERS + autoencoder, "scores or optimizer": 0, "passes": decoding}
            found[f"{what}: drawing"] = giga(parts | beside)
            # in turn: the network with a step of its own, for which half of a pass there and back is more than enough
            in_turn = {"encoders": 0, "scores or optimizer": 0, "passes": passes / 2}
            found[f"{what}: drawing, --offload"] = giga(parts | in_turn)
            # guided: with and without the prompt; a score in fp32 for each weight in scope
            beside = {"encoders": 0, "scores or optimizer": 4 * sum(trained.values()), "passes": passes}
            found[f"{what}: saliency"] = giga(parts | beside)
            for density in densities:
                kept = density * sum(trained.values())
                state = kept * (2 + 4 + 4 + 4 + 4) + sum(trained.values()) / 8
                state += max(trained.values()) * (1 + 8 * density)  # as in benchmarks.memory
                beside = {
                    "encoders": 0,
                    "scores or optimizer": state,
                    "passes": passes,
                }  # of a forget and a retain picture
                found[f"{what}: training, density {density}"] = giga(parts | beside)
    return found


def _passes(samples: int) -> float:
    """Bytes that a pass of all blocks there and back takes beside the weights."""
    one, double, single = (_replayed(samples, *blocks) for blocks in ((1, 1), (2, 1), (1, 2)))
    return one + (DOUBLE - 1) * (double - one) + (SINGLE - 1) * (single - one)


def _decoding() -> tuple[int, int]:
    """Bytes of Flux's autoencoder in fp32, and of what it takes beside that to decode one picture."""
    with FakeTensorMode(), torch.no_grad():
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=16, layers_per_block=2, norm_num_groups=32,
            use_quant_conv=False, use_post_quant_conv=False,
        ).eval()  # fmt: skip
        latents, tracker = torch.randn(1, 16, 128, 128), MemTracker()
        tracker.track_external(vae)
        with tracker:
            vae.decode(latents)
        peak = next(iter(tracker.get_tracker_snapshot("peak").values()))["Total"]
    own = sum(p.numel() * p.element_size() for p in vae.parameters())
    return own, peak - own


def _replayed(samples: int, double: int, single: int) -> int:
    dtype = torch.bfloat16
    with FakeTensorMode():
        torch.set_default_dtype(dtype)
        network = FluxTransformer2DModel(guidance_embeds=True, num_layers=double, num_single_layers=single).eval()
        torch.set_default_dtype(torch.float32)
        network.enable_gradient_checkpointing()
        for parameter in network.parameters():
            parameter.register_post_accumulate_grad_hook(_drop)
        given = {
            "hidden_states": torch.randn(samples, PICTURE, 64, dtype=dtype),
            "encoder_hidden_states": torch.randn(samples, TEXT, 4096, dtype=dtype),
            "pooled_projections": torch.randn(samples, 768, dtype=dtype),
            "timestep": torch.rand(samples),
            "guidance": torch.ones(samples),
            "img_ids": torch.zeros(PICTURE, 3, dtype=dtype),
            "txt_ids": torch.zeros(TEXT, 3, dtype=dtype),
        }
        tracker = MemTracker()
        tracker.track_external(network)
        with tracker:
            network(**given, return_dict=False)[0].float().square().mean().backward()
        peak = next(iter(tracker.get_tracker_snapshot("peak").values()))["Total"]
    return peak - sum(p.numel() * p.element_size() for p in network.parameters())
