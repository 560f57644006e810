"""The options of ``python -m benchmarks``."""

from dataclasses import dataclass

from salun_diffusion.options import option

MEASUREMENTS = (
    "reference_step",
    "our_step",
    "mask",
    "delta",
    "memory",
    "i2p",
    "accuracy",
    "attack",
    "attack_memory",
    "flux_memory",
)


@dataclass
class BenchmarkConfig:
    """What is measured, and on what."""

    only: list[str] = option(list(MEASUREMENTS), "measure only these", MEASUREMENTS, several=True)
    resolution: int = option(128, "pixels a side of the training pictures", least=1)
    batch_size: int = option(2, "pictures of each set a step", least=1)
    steps: int = option(4, "steps; the median of all but the first counts", least=1)
    dtype: str = option("fp32", "of the U-Net", ("fp32", "bf16"))
    device: str = option("cpu", "where it runs", ("cpu", "cuda"))
    part: str | None = option(
        None, "keep the results in a file of their own, results-DEVICE-PART.json, beside those of other settings"
    )
    gradient_checkpointing: bool = option(False, "recompute activations, in both recipes")
    tiny: bool = option(False, "networks of a few weights, to see that everything runs; nothing is recorded")
    scores: int = option(860_000_000, "scores to select a mask from", least=1)
