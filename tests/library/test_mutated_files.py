"""The readers of erasures and masks under thousands of damaged files: each is refused in a sentence, or is sound.

The normal suite takes a sample; ``SALUN_MUTATIONS=10000`` before the command takes them all, from the same seed.
"""

import json
import os
import random
import re

import pytest
import torch
from diffusers import DiffusionPipeline
from shell import run
from test_delta import random_delta

from salun_diffusion.erasures.adapter import Adapter, save_adapter
from salun_diffusion.erasures.delta import Delta
from salun_diffusion.erasures.mask import load_masks, save_masks
from salun_diffusion.errors import SalunError

COUNT = int(os.environ.get("SALUN_MUTATIONS", 400))
SIZES = ["-1", "0", "1.0", "true", "65", str(2**31), str(2**62), str(2**64), "9" * 5000, "[" * 3000, "NaN", "1e999"]
JSON = ["1.0", "true", "2", "NaN", "Infinity", "-Infinity", "1e999", "null", "[" * 5000, "9" * 5000, '{"a":1,"a":2}']
SHAPES = [json.dumps([1] * 65), "[0]", f"[0,{2**62},{2**62}]", f"[{2**40},{2**40}]", "[]", "[NaN]", '"x"']


def mutated(raw: bytes, dice: random.Random) -> bytes:
    """``raw`` with one fault: a byte, its length, a word of the header, or a value of its metadata."""
    length = int.from_bytes(raw[:8], "little")
    header, body = raw[8 : 8 + length].decode(), raw[8 + length :]
    kind = dice.randrange(6)
    if kind == 0:
        at = dice.randrange(len(raw))
        return raw[:at] + bytes([dice.randrange(256)]) + raw[at + 1 :]
    if kind == 1:
        return raw[: dice.randrange(len(raw))]
    if kind == 2:  # a number of the header
        at = dice.choice(list(re.finditer(r"(?<=[\[,:])\d+(?=[\],}])", header)))
        header = header[: at.start()] + dice.choice(SIZES) + header[at.end() :]
    elif kind == 3:  # a name twice
        header = header[:-1].rstrip().removesuffix("}") + "," + header[1:]
    elif kind == 4:  # a dtype
        header = re.sub('"dtype":"[A-Z0-9]+"', f'"dtype":"{dice.choice(["F8_E4M3", "F8_E5M2", "C64", "U64"])}"', header)
    else:
        parts = json.loads(header)
        text = parts["__metadata__"]
        key = dice.choice(sorted(text))
        text[key] = dice.choice([*JSON, *SHAPES, *(f'{{"bias":{shape}}}' for shape in SHAPES), "x" * 64, "", "0" * 63])
        header = json.dumps(parts)
    header = header.encode()
    return len(header).to_bytes(8, "little") + header + body


def raw_fault(path, load, version="1"):
    """What reading the file raised, if it was no sentence; None if it was refused in one or read."""
    try:
        load(path)
    except SalunError as error:
        return None if "\n" not in str(error) else f"two lines: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    text = path.read_bytes()[8:]
    header = json.loads(text[: int.from_bytes(path.read_bytes()[:8], "little")], object_pairs_hook=list)
    metadata = dict(dict(header)["__metadata__"])
    if len(dict(header)) != len(header) or metadata["version"] != version:
        return f"accepted: version {metadata['version'][:20]}, or a name twice"
    if any(re.search(r"\b(NaN|Infinity)\b", metadata.get(key, "")) for key in ("density", "settings", "shapes")):
        return "accepted: NaN or Infinity as JSON"
    if load != load_masks and not re.fullmatch("[0-9a-f]{64}", metadata["structure"]):
        return f"accepted: structure {metadata['structure'][:70]}"
    return None


@pytest.mark.parametrize("kind", ["delta", "mask", "adapter", "scaled adapter"])
def test_every_mutation_is_refused_in_a_sentence_or_sound(kind, tiny_folder, tmp_path):
    path, dice = tmp_path / "file.safetensors", random.Random(14)
    _, delta = random_delta([(3, 5), (0,), (2, 2, 2)], settings={"steps": 3}, density=0.5)
    if kind == "delta":
        delta.save(path)
    elif kind == "mask":
        save_masks(path, delta.masks, {"settings": {"steps": 3}, "density": 0.5})
    else:
        factors = {"a.lora_A.weight": torch.ones(2, 5), "a.lora_B.weight": torch.ones(3, 2)}
        factors |= {"b.lora_A.weight": torch.ones(1, 2, 3, 3), "b.lora_B.weight": torch.ones(2, 1, 1, 1)}
        save_adapter(
            path,
            DiffusionPipeline.from_pretrained(tiny_folder),
            factors,
            delta.fingerprint,
            {"settings": {"steps": 3}, "rank": 2} | ({"by_prompt": ["cat"]} if kind == "scaled adapter" else {}),
        )
    load, version = {"delta": Delta.load, "mask": load_masks}.get(kind, Adapter.load), "2" if "scaled" in kind else "1"
    raw, faults = path.read_bytes(), []
    for number in range(COUNT // 2):
        path.write_bytes(mutated(raw, dice))
        if fault := raw_fault(path, load, version):
            faults.append(f"{number}: {fault}")
    assert not faults, "\n".join(faults[:20])


def test_a_fingerprint_has_a_row_for_each_changed_parameter(tmp_path):
    path = tmp_path / "file.safetensors"
    _, delta = random_delta([(3, 5)])
    object.__setattr__(delta.fingerprint, "samples", torch.zeros(1, 16))
    delta.save(path)
    with pytest.raises(SalunError, match="has 1 rows, fewer than the 2 parameters"):
        Delta.load(path)


def test_a_header_may_not_claim_a_hundred_megabytes(tmp_path):
    path = tmp_path / "file.safetensors"
    with open(path, "wb") as file:
        file.write((99_000_000).to_bytes(8, "little") + b"{")
        file.truncate(99_000_008)
    for load in (Delta.load, load_masks):
        with pytest.raises(SalunError, match="claims a header of 99000000 bytes"):
            load(path)


def test_a_mask_of_holes_takes_no_memory_for_each_weight(tmp_path):
    path, packed = tmp_path / "mask.safetensors", 1 << 28
    code = (
        "import resource, sys; from salun_diffusion.errors import SalunError\n"
        "from salun_diffusion.erasures.mask import load_masks\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: load_masks(sys.argv[1])\n"
        "except SalunError as error: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)\n"
    )
    header = {"a.mask": {"dtype": "U8", "shape": [packed], "data_offsets": [0, packed]}}
    header["__metadata__"] = {"format": "salun-mask", "version": "1", "shapes": json.dumps({"a": [packed * 8]})}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + packed)
    taken, fault = run("python", "-c", code, path).stdout.split(" ", 1)
    assert "selects no weight" in fault
    assert int(taken) < 3 * packed / 1024  # the file mapped and its copy, in kilobytes; a byte a weight would be 8
