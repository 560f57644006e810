"""What a step holds in a GPU's memory at its worst moment, by accounting: no GPU is needed.

The passes of the U-Net are replayed on fake tensors, which have shapes and no content, under PyTorch's own memory
tracker; what the optimizer keeps is counted. Not in it: the CUDA context, and what the allocator loses to fragments.
"""

import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from salun_diffusion.masks.scope import scoped_parameters

from .config import BenchmarkConfig

SIDE = 64  # of the latents of 512 pixels
GIGA = 1e9


def memory(config: BenchmarkConfig) -> dict:
    """GB at 512 pixels with activations recomputed: ours in bf16 at density 0.5 and 0.1, and the reference in fp32."""
    found = {}
    for batch in (8, 1):
        network, passes = replayed(torch.bfloat16, 2 * batch)
        weights = 2 * sum(p.numel() for p in network.parameters())
        scoped = [p.numel() for p in scoped_parameters(network, "cross-attention+resnets").values()]
        for density in (0.5, 0.1):
            # of each masked weight its base in bf16; its change, gradient and Adam's two moments in fp32
            optimizer = density * sum(scoped) * (2 + 4 + 4 + 4 + 4)
            mask = sum(scoped) / 8 + max(scoped) * (1 + 8 * density)  # and one parameter's places at a time, as int64
            parts = {"weights": weights, "optimizer": optimizer, "mask": mask, "passes": passes}
            found[f"ours, batch {batch}, bf16, density {density}"] = giga(parts)
    network, passes = replayed(torch.float32, 16, dense=True)
    count = sum(p.numel() for p in network.parameters())
    # Adam's moments in fp32, the mask as the int64 that the reference saves; the gradients are among the passes
    parts = {"weights": 4 * count, "optimizer": 8 * count, "mask": 8 * count, "passes": passes}
    return found | {"reference, batch 8, fp32": giga(parts)}


def giga(parts: dict[str, float]) -> dict[str, float]:
    """Bytes as GB, and their ``total``."""
    return {name: size / GIGA for name, size in (parts | {"total": sum(parts.values())}).items()}


def replayed(
    dtype: torch.dtype, samples: int, dense: bool = False, recompute: bool = True
) -> tuple[UNet2DConditionModel, int]:
    """A fake network, and the bytes that a pass of ``samples`` there and back takes beside its weights. ``dense``
    gradients stay; otherwise each is gone as soon as it is packed. ``recompute``: activations are not kept.
    """
    with FakeTensorMode():
        torch.set_default_dtype(dtype)
        network = UNet2DConditionModel(sample_size=SIDE, cross_attention_dim=768, attention_head_dim=8).eval()
        torch.set_default_dtype(torch.float32)
        if recompute:
            network.enable_gradient_checkpointing()
        if not dense:
            for parameter in network.parameters():  # also those out of scope: the tracker cannot do with frozen ones
                parameter.register_post_accumulate_grad_hook(_drop)

        # of a step, those of the forget and the retain batch together; the anchor's pass alone needs less
        latents = torch.randn(samples, 4, SIDE, SIDE, dtype=dtype)
        text = torch.randn(samples, 77, 768, dtype=dtype)
        tracker = MemTracker()
        tracker.track_external(network)
        with tracker:
            network(latents, torch.zeros(samples, dtype=torch.long), text).sample.float().square().mean().backward()
        peak = next(iter(tracker.get_tracker_snapshot("peak").values()))["Total"]
    return network, peak - sum(p.numel() * p.element_size() for p in network.parameters())


def _drop(parameter: torch.nn.Parameter) -> None:
    parameter.grad = None
