"""``diffusers``: the whole pipeline's folder with the erasure in its weights.

The denoiser's config names the erasure (its name, scale and digest), so that :func:`.load_erasure` does not apply it a
second time.
"""

import os
import tempfile
from pathlib import Path


def write(request):
    """Write the folder, all of it or none."""
    output = request.output
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as temporary:
        made = Path(temporary, "pipeline")
        request.pipe.save_pretrained(made)
        os.replace(made, output)
    return None, []


def read_back(request, pipe) -> None:
    """As a user of diffusers does."""
    again = type(pipe).from_pretrained(request.output, use_safetensors=True)
    for name, module in pipe.components.items():
        if hasattr(module, "load_state_dict"):
            module.load_state_dict(getattr(again, name).state_dict())
