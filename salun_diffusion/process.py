"""How a run sits in its surroundings: accelerate's object for it, and how it is asked to stop."""

import importlib.util
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState

from .config import EraseConfig
from .errors import SalunError


def accelerator_for(config: EraseConfig) -> Accelerator:
    """accelerate's own object for this run.

    Raises:
        SalunError: a precision that the device lacks, or a tracker that is not installed.
    """
    if config.report_to and importlib.util.find_spec(config.report_to) is None:
        raise SalunError(f"--report_to {config.report_to} needs a package: pip install {config.report_to}.")
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=config.report_to,
            project_dir=str(Path(config.output_dir) / "logs"),
        )
    except ValueError as error:
        raise SalunError(f"--mixed_precision {config.mixed_precision} cannot be used here: {error}") from None
    spread_threads(accelerator)
    return accelerator


def spread_threads(state: Accelerator | PartialState) -> None:
    """Share the processor's cores among the processes: accelerate launch and torchrun leave each one thread unless told
    otherwise."""
    if state.device.type == "cpu" and os.environ.get("OMP_NUM_THREADS") == "1":
        mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, mine // state.num_processes))


class Stopped(KeyboardInterrupt):
    """The user, or the machine's scheduler, asked to stop, and what was done so far is saved."""


class StopSignal:
    """Within it, Ctrl-C and SIGTERM set ``wanted`` once; a second one acts as usual."""

    def __enter__(self) -> "StopSignal":
        self.wanted = False
        self.old = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame) -> None:
        self.wanted = True
        signal.signal(number, self.old[number])
        print("\nStopping after this step; once more to stop at once.", file=sys.stderr)

    def __exit__(self, *error) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)
