"""``unet``: the erased denoiser's state dict, as the field's attack and evaluation tools take it."""

from ..models.load import denoiser
from ..tensors import write_safetensors


def write(request):
    """Write every tensor of the denoiser under its diffusers name, in fp32."""
    tensors = {name: value.detach().contiguous() for name, value in denoiser(request.pipe).state_dict().items()}
    write_safetensors(request.output, tensors, request.metadata)
    return None, []


def read_back(request, pipe) -> None:
    """As such a tool does."""
    from safetensors.torch import load_file

    denoiser(pipe).load_state_dict(load_file(request.output))
