"""One measurement in a process of its own, for :mod:`benchmarks.__main__`: its name, and the options as JSON.

The last line that it prints is the result, as JSON.
"""

import json
import os
import sys

from .config import BenchmarkConfig


def main() -> None:
    name, options = sys.argv[1:]
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice on optional packages helps nobody here
    from . import accuracy, attack, attack_memory, evaluation, flux_memory, loading, measurements, memory

    modules = (memory, flux_memory, evaluation, loading, measurements, attack, attack_memory, accuracy)
    work = next(getattr(module, name) for module in modules if hasattr(module, name))
    print(json.dumps(work(BenchmarkConfig(**json.loads(options)))))


if __name__ == "__main__":
    main()
