"""Safetensors files: written with the same bytes for the same content, and read with every fault named first."""

import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from .errors import SalunError
from .files import listed, replacing, strict_json

HEADER_LIMIT = 100_000_000  # bytes: the limit of the safetensors format itself
OUR_HEADER_LIMIT = 4_000_000  # bytes: the largest models' need a tenth, and parsing takes ten times a header's memory
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors(path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write ``tensors`` and ``metadata`` (text to text) as a safetensors file, atomically.

    The bytes depend on the content alone: ``safetensors.save_file`` shuffles the metadata from run to run and makes the
    file unreadable to other users, so the header (a length, then JSON) is written here.

    Raises:
        SalunError: a dtype without a safetensors name, metadata that is not text, or a disk that refuses the file.
    """
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise SalunError(f"Cannot write {path}: metadata {key!r} must be text, not {type(value).__name__}.")
    header, end = {"__metadata__": dict(sorted(metadata.items()))}, 0
    # Widest values first, so that every tensor starts at a multiple of its own item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in DTYPE_NAMES:
            raise SalunError(f"Cannot write {path}: {name!r} has dtype {tensor.dtype}, which this file cannot hold.")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(raw_bytes(tensors[name]))


def read_safetensors(path, header_limit: int = HEADER_LIMIT) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors (on the CPU) and the metadata of a safetensors file, whose header may have ``header_limit`` bytes.

    Raises:
        SalunError: a missing file, a file of another kind (Git-LFS pointer, web page, pickle or zip checkpoint: a
            pickle is never loaded), a header that is garbage or over 100 MB, a file cut short, NaN or Inf values.
    """
    with _opened(path, header_limit) as file:
        # Copies: a tensor that still lies in the file would change, or crash, with it.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        metadata = file.metadata() or {}
    if odd := [name for name, value in tensors.items() if value.dtype not in DTYPE_NAMES]:  # float8 lacks isfinite
        raise SalunError(f"{path} holds {listed(odd)} in a dtype that is not read here; save it as float32 or float16.")
    broken = [name for name, value in tensors.items() if value.is_floating_point() and not is_finite(value)]
    if broken:
        raise SalunError(f"{path} holds NaN or Inf in {listed(broken)}; a sound file has none, so make it again.")
    return tensors, metadata


def read_metadata(path) -> dict[str, str]:
    """The metadata alone of a safetensors file.

    Raises:
        SalunError: as :func:`read_safetensors`, but for the values.
    """
    with _opened(path) as file:
        return file.metadata() or {}


@contextmanager
def _opened(path, header_limit: int = HEADER_LIMIT):
    """A safetensors file whose layout is sound, open."""
    path = Path(path)
    if path.is_dir():
        raise SalunError(f"{path} is a folder; give the safetensors file inside it.")
    if not path.is_file():
        raise SalunError(f"{path} does not exist; check the path.")
    try:
        check_layout(path, header_limit)
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, RuntimeError, OverflowError) as error:  # the last two: shapes that torch cannot hold
        raise SalunError(f"{path} is not a valid safetensors file ({error}); fetch or save it again.") from error
    except OSError as error:
        raise SalunError(f"Cannot read {path}: {error.strerror or error}.") from error


# float dtype -> integers of its size, and the bits of its exponent, all of which are set in NaN and Inf alone
_EXPONENTS = {
    torch.float64: (torch.int64, 0x7FF << 52),
    torch.float32: (torch.int32, 0xFF << 23),
    torch.float16: (torch.int16, 0x1F << 10),
    torch.bfloat16: (torch.int16, 0xFF << 7),
}


def is_finite(values: torch.Tensor) -> bool:
    """`values.isfinite().all()`, of any float dtype but those of 8 bits, several times to a hundred times faster.

    The bits without their sign are compared as integers, in pieces that fit a cache; arithmetic on float16 is slow.
    """
    integers, exponent = _EXPONENTS[values.dtype]
    bits = values.detach().cpu().contiguous().flatten().view(integers).numpy()
    sizes = np.iinfo(bits.dtype).max  # all bits but the sign
    pieces = (bits[start : start + (1 << 16)] for start in range(0, len(bits), 1 << 16))
    return all(int((piece & sizes).max()) < exponent for piece in pieces)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor of any dtype and device, row-major."""
    return tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().data


def check_layout(path: Path, header_limit: int = HEADER_LIMIT) -> None:
    """Refuses, with the reason, a file that is not one whole safetensors file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(512)
        if start[8:9] != b"{":  # a safetensors header MUST start with a brace, so nothing sound is sniffed away here
            raise SalunError(f"{path} {_other_kind(start)}")
        length = int.from_bytes(start[:8], "little")
        if length > header_limit:
            raise SalunError(
                f"{path} claims a header of {length} bytes where {_allowed(header_limit)}; "
                "it is damaged or no safetensors file, so fetch or save it again."
            )
        if size < 8 + length:
            raise SalunError(
                f"{path} is cut short inside its header: at least {8 + length} bytes expected, {size} found; "
                "fetch or save it again."
            )
        file.seek(8)
        text = file.read(length)
    try:
        header = strict_json(text)
        header.pop("__metadata__", None)
        expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise SalunError(f"{path} has a garbage safetensors header; fetch or save it again.") from error
    if size != expected:
        fault = "is cut short" if size < expected else "has bytes after its end"
        raise SalunError(f"{path} {fault}: {expected} bytes expected, {size} found; fetch or save it again.")


def _allowed(header_limit: int) -> str:
    return f"{'safetensors' if header_limit == HEADER_LIMIT else 'a file of this kind'} allows {header_limit}"


def _other_kind(start: bytes) -> str:
    """What a file that is no safetensors file seems to be, and what to do about it."""
    if not start:
        return "is empty; fetch or save it again."
    if start.startswith(b"version https://git-lfs"):
        return "is a Git-LFS pointer, not the weights; run `git lfs pull` to fetch them."
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page saved as weights; download the file itself (the raw link)."
    if start.startswith(b"PK\x03\x04"):
        return "is a zip archive, as torch.save writes (a pickle); only safetensors files are loaded: convert it first."
    if start[:1] == b"\x80" and start[1:2] in b"\x01\x02\x03\x04\x05":
        return "is a pickle, which can run code when loaded; only safetensors files are loaded: convert it first."
    return "has no safetensors header; it is damaged or another kind of file, so fetch or save it again."
