"""What the files of this project have in common: metadata as text or JSON, shapes, and tensors that these name."""

import json
import math

from ..errors import SalunError
from ..files import listed, strict_json

TEXT = (
    "format",
    "concept",
    "method",
    "scope",
    "base_model",
    "base_revision",
    "structure",
    "component",
)  # all other keys are JSON
DIMENSIONS, WEIGHTS = 16, 1 << 36  # of a parameter, and of all together: no model has as many
RESERVED = ("format", "version", "shapes", "structure", "component")  # written by the library, never by its caller


def metadata_to_text(path, metadata: dict, **reserved) -> dict[str, str]:
    """Metadata as safetensors stores it, text to text; a value of None is left out."""
    taken = set(metadata) & set(RESERVED)
    if taken:
        raise SalunError(f"Cannot write {path}: the format itself fills the metadata {listed(taken)}; rename yours.")
    text = {}
    for key, value in {**metadata, **reserved}.items():
        if value is None:
            continue
        if key in TEXT and not isinstance(value, str):
            raise SalunError(f"Cannot write {path}: metadata {key!r} must be text, not {type(value).__name__}.")
        try:
            text[key] = value if key in TEXT else json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise SalunError(f"Cannot write {path}: JSON cannot hold metadata {key!r} ({error}).") from error
    return text


def metadata_from_text(path, text: dict[str, str], format: str, *versions: int) -> dict:
    """The inverse of `metadata_to_text`; refuses another format, or a version that is none of ours."""
    found = text.get("format")
    if found != format:
        raise SalunError(f"{path} is not a {format} file (its metadata says {found!r}); give one that this tool wrote.")
    metadata = {}
    for key, value in text.items():
        try:
            metadata[key] = value if key in TEXT else strict_json(value)
        except ValueError as error:
            raise SalunError(f"{path} is damaged: its metadata {key!r} is not JSON by its standard.") from error
    if type(metadata.get("version")) is not int or metadata["version"] not in versions:  # 1.0 and true equal 1 too
        known = " and ".join(map(str, versions)) + (" is" if len(versions) == 1 else " are")
        raise SalunError(
            f"{path} has version {metadata.get('version')!r} of the {format} format where {known} known; "
            "update salun_diffusion."
        )
    return metadata


def read_shapes(path, metadata: dict) -> dict[str, list[int]]:
    shapes = metadata.get("shapes")
    sound = isinstance(shapes, dict) and all(
        isinstance(shape, list)
        and len(shape) <= DIMENSIONS
        and all(type(size) is int and 0 <= size <= WEIGHTS for size in shape)
        and math.prod(max(size, 1) for size in shape) <= WEIGHTS  # torch multiplies the others where one is 0
        for shape in shapes.values()
    )
    if not sound:
        raise SalunError(f"{path} is damaged: its metadata 'shapes' must map each parameter to its sizes.")
    if sum(map(math.prod, shapes.values())) > WEIGHTS:
        raise SalunError(f"{path} claims more than {WEIGHTS} weights, so it is damaged; fetch or make it again.")
    return shapes


def check_keys(path, tensors: dict, expected: set[str]) -> None:
    missing, unexpected = expected - set(tensors), set(tensors) - expected
    if missing:
        raise SalunError(f"{path} is damaged: it lacks the tensors {listed(missing)}.")
    if unexpected:
        raise SalunError(f"{path} is damaged: it holds tensors that its metadata does not name: {listed(unexpected)}.")
