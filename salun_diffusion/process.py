"""How a run sits in its surroundings: accelerate's object for it, its progress bars, and how it is asked to stop."""

import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env
from tqdm import tqdm

from .errors import SalunError

Callback = Callable[[str, int, int], None]
_CALLBACK: ContextVar[Callback | None] = ContextVar("callback", default=None)


@contextmanager
def accelerator_for(mixed_precision: str, output_dir: Path, report_to: str | None = None) -> Iterator[Accelerator]:
    """Accelerate's own object for a run. What it leaves behind in the process is taken away, so that the next run of
    the same process may have another precision; an accelerator that the caller has made stays as it is.

    Raises:
        SalunError: a precision that the device lacks, one that differs from the caller's own accelerator's, or a
            tracker that is not installed.
    """
    if report_to and importlib.util.find_spec(report_to) is None:
        raise SalunError(f"--report_to {report_to} needs a package: pip install {report_to}.")
    callers = bool(AcceleratorState._shared_state)
    try:
        accelerator = Accelerator(
            mixed_precision=mixed_precision, log_with=report_to, project_dir=str(Path(output_dir) / "logs")
        )
    except ValueError as error:
        raise SalunError(f"--mixed_precision {mixed_precision} cannot be used here: {error}") from None
    spread_threads(accelerator)
    try:
        yield accelerator
    finally:
        if not callers:
            AcceleratorState._reset_state()  # the place among the processes (PartialState) stays


def place() -> PartialState:
    """This process's place among the others, for work that is shared without training.

    Accelerate's own object looks for other processes on a processor only where it is told that it is on one: without
    that, each of them would take itself for the only one.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def emulates_bf16(device: torch.device | str) -> bool:
    """Whether a device is a processor without instructions for bf16 (AVX-512 BF16, AMX): it then takes longer than in
    fp32, with AVX2 alone many times as long. Older versions of torch cannot tell, and none can of other than x86
    processors: False.
    """
    known = getattr(torch.cpu, "get_capabilities", dict)() if torch.device(device).type == "cpu" else {}
    return known.get("avx2", False) and not (known.get("avx512_bf16", False) or known.get("amx_bf16", False))


def spread_threads(state: Accelerator | PartialState) -> None:
    """Share the processor's cores among the processes: accelerate launch and torchrun leave each one thread unless told
    otherwise. An OMP_NUM_THREADS of the user's own is kept.
    """
    if state.device.type == "cpu" and os.environ.get("OMP_NUM_THREADS") == "1" and not _is_users("OMP_NUM_THREADS"):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // state.num_processes))


def _is_users(variable: str) -> bool:
    """Whether ``variable`` comes from the user, and not from a launcher, which was started without it itself."""
    if not {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & {*os.environ}:
        return True
    try:
        return variable in psutil.Process(os.getppid()).environ()
    except (psutil.Error, OSError):  # another user's, or gone
        return False


class Bar(tqdm):
    """tqdm that also tells :func:`reporting_to`'s callback of every step, hidden or not."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.done = options.get("initial") or 0
        self.stage, self.whole = options.get("desc") or "", options.get("total") or 0

    def update(self, n=1):
        self.done += n
        callback = _CALLBACK.get()
        if callback:
            callback(self.stage, self.done, self.whole)
        return super().update(n)

    def __iter__(self):
        with self:
            for item in self.iterable:
                yield item
                self.update()


def progress(stage: str, total: int, unit: str, shown: bool, initial: int = 0, over=None) -> Bar:
    """A bar for ``total`` ``unit``s of work, drawn in the main process alone (``shown``), or over an iterable."""
    return Bar(over, desc=stage, total=total, unit=unit, initial=initial, disable=not shown)


@contextmanager
def reporting_to(callback: Callback | None) -> Iterator[None]:
    """Within it, and in this thread alone, every bar calls ``callback(stage, done, total)``."""
    token = _CALLBACK.set(callback)
    try:
        yield
    finally:
        _CALLBACK.reset(token)


class Stopped(KeyboardInterrupt):
    """The user, or the machine's scheduler, asked to stop, and what was done so far is saved."""


class StopSignal:
    """Within it, Ctrl-C and SIGTERM set ``wanted`` once; a second one acts as usual. Python lets only the main thread
    take signals: in any other it does nothing.
    """

    def __enter__(self) -> "StopSignal":
        self.wanted, self.old = False, {}
        if threading.current_thread() is threading.main_thread():
            self.old = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame) -> None:
        self.wanted = True
        signal.signal(number, self.old[number])
        print("\nStopping after this step; once more to stop at once.", file=sys.stderr)

    def __exit__(self, *error) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)
