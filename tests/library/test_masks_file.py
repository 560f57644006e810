"""Bit packing, the mask file, and what files.py promises of every file."""

import json
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import salun_diffusion
from salun_diffusion.erasures.mask import describe, load_masks, pack, places, save_masks, unpack
from salun_diffusion.errors import SalunError
from salun_diffusion.files import listed, write_json
from salun_diffusion.tensors import read_safetensors, write_safetensors

ROOT = Path(__file__).parents[2]
SHAPES = st.lists(st.integers(0, 7), max_size=4).map(tuple)  # 0-d, empty and odd sizes included


def random_mask(shape, seed, density=0.5):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def slow_pack(mask):
    """The bit order in so many words: weight i is bit i % 8 of byte i // 8."""
    weights = mask.flatten().tolist()
    packed = [0] * ((len(weights) + 7) // 8)
    for i, kept in enumerate(weights):
        if kept:
            packed[i // 8] += 2 ** (i % 8)
    return torch.tensor(packed, dtype=torch.uint8)


@settings(max_examples=80, deadline=None)
@given(SHAPES, st.integers(0, 99), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_pack_equals_the_slow_twin_and_comes_back(shape, seed, density):
    mask = random_mask(shape, seed, density)
    packed = pack(mask)
    assert packed.dtype == torch.uint8 and torch.equal(packed, slow_pack(mask))
    assert torch.equal(places(packed), mask.flatten().nonzero().flatten())
    back = unpack(packed, shape)
    assert back.dtype == torch.bool and back.shape == mask.shape and torch.equal(back, mask)


def test_pack_counts_row_major_whatever_the_memory_layout():
    mask = random_mask((2, 3, 4, 5), 0)
    assert torch.equal(pack(mask.to(memory_format=torch.channels_last)), slow_pack(mask))
    assert torch.equal(pack(mask.transpose(0, 3)), slow_pack(mask.transpose(0, 3).contiguous()))


def test_pack_and_unpack_refuse():
    with pytest.raises(SalunError, match=r"A mask must be a bool tensor, not torch.uint8"):
        pack(torch.ones(3, dtype=torch.uint8))
    with pytest.raises(SalunError, match=r"shape \(3, 3\) is 2 bytes of uint8, but this one is torch.uint8 of shape"):
        unpack(torch.zeros(3, dtype=torch.uint8), (3, 3))
    with pytest.raises(SalunError, match=r"is 2 bytes of uint8, but this one is torch.int32"):
        unpack(torch.zeros(2, dtype=torch.int32), (3, 3))
    assert unpack(torch.tensor([0, 0b1], dtype=torch.uint8), (9,)).tolist() == [False] * 8 + [True]
    with pytest.raises(SalunError, match=r"bits set past its last weight \(of 9\)"):
        unpack(torch.tensor([0, 0b11], dtype=torch.uint8), (9,))


@settings(max_examples=20, deadline=None)
@given(st.lists(SHAPES, min_size=1, max_size=4), st.integers(0, 99))
def test_mask_file_round_trip(tmp_path_factory, shapes, seed):
    path = tmp_path_factory.mktemp("mask") / "mask.safetensors"
    masks = {f"layer.{i}.weight": random_mask(shape, seed + i) for i, shape in enumerate(shapes)}
    masks["full"] = torch.ones(3, dtype=torch.bool)
    metadata = {"concept": "0.5", "density": 0.5, "settings": {"steps": 3, "names": ["a", None]}, "odd key": "text"}
    save_masks(path, masks, {**metadata, "base_revision": None})
    loaded, found = load_masks(path)
    assert found == metadata
    assert loaded.keys() == masks.keys()
    for name, mask in masks.items():
        assert loaded[name].dtype == torch.bool and torch.equal(loaded[name], mask)
    # Any safetensors reader sees it: one uint8 tensor a parameter, an eighth of a byte a weight.
    raw = load_file(path)
    assert all(torch.equal(raw[f"{name}.mask"], slow_pack(mask)) for name, mask in masks.items())


def test_describe_counts():
    masks = {"b": torch.tensor([[True, False], [False, False]]), "a": torch.zeros(0, dtype=torch.bool)}
    assert [tuple(row) for row in describe(masks)] == [("b", 1, 4, 0.25), ("a", 0, 0, 0.0)]
    assert describe(masks)[0].share == 0.25


def test_saving_masks_refuses(tmp_path):
    path, mask = tmp_path / "mask.safetensors", {"a": torch.ones(3, dtype=torch.bool)}
    cases = [
        ({"a": torch.zeros(3, dtype=torch.bool)}, {}, "the mask selects no weight at all; choose a density above 0"),
        ({}, {}, "the mask selects no weight at all"),
        ({"a": torch.ones(3)}, {}, "A mask must be a bool tensor, not torch.float32"),
        (mask, {"shapes": 1}, "the format itself fills the metadata shapes; rename yours"),
        (mask, {"concept": 3}, "metadata 'concept' must be text, not int"),
        (mask, {"settings": {1, 2}}, "JSON cannot hold metadata 'settings'"),
        (mask, {"density": float("nan")}, "JSON cannot hold metadata 'density'"),
    ]
    for masks, metadata, sentence in cases:
        with pytest.raises(SalunError, match=sentence):
            save_masks(path, masks, metadata)
    assert list(tmp_path.iterdir()) == []


def test_loading_masks_refuses(tmp_path):
    path = tmp_path / "mask.safetensors"
    good = {"format": "salun-mask", "version": "1", "shapes": '{"a": [9]}'}
    bits, over = torch.tensor([1, 0], dtype=torch.uint8), torch.tensor([1, 2], dtype=torch.uint8)
    cases = [
        ({"a.mask": bits}, {}, r"is not a salun-mask file \(its metadata says None\)"),
        ({"a.mask": bits}, {**good, "format": "pt"}, r"is not a salun-mask file \(its metadata says 'pt'\)"),
        (
            {"a.mask": bits},
            {**good, "version": "2"},
            r"has version 2 of the salun-mask format where 1 is known; update",
        ),
        ({"a.mask": bits}, {**good, "version": "two"}, r"its metadata 'version' is not JSON"),
        ({"a.mask": bits}, {**good, "shapes": '{"a": [-9]}'}, r"'shapes' must map each parameter to its sizes"),
        ({"a.mask": bits}, {**good, "shapes": "[9]"}, r"'shapes' must map each parameter to its sizes"),
        ({"a.mask": bits}, {**good, "shapes": '{"a": [9], "b": [1]}'}, r"it lacks the tensors b\.mask"),
        ({"a.mask": bits, "x": bits * 1}, good, r"holds tensors that its metadata does not name: x"),
        ({"a.mask": bits}, {**good, "shapes": '{"a": [99]}'}, r"a\.mask: a packed mask of shape \(99,\) is 13 bytes"),
        ({"a.mask": over}, good, r"a\.mask: a packed mask has bits set past its last weight \(of 9\)"),
        ({"a.mask": bits * 0}, good, r"the mask selects no weight at all"),
    ]
    for tensors, metadata, sentence in cases:
        save_file(tensors, path, metadata)
        with pytest.raises(SalunError, match=sentence) as caught:
            load_masks(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# files.py


def test_safetensors_files_are_plain_and_reproducible(tmp_path):
    path, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    tensors = {
        "bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "half": torch.randn(3, 5, dtype=torch.float16).t(),
        "bf": torch.randn(2, dtype=torch.bfloat16),
        "number": torch.tensor(2.5),
        "none": torch.zeros(0, 4),
        "flag": torch.tensor([True, False]),
    }
    metadata = {key: key + " é" for key in "qwertyuiop"}
    write_safetensors(path, tensors, metadata)
    write_safetensors(again, dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert path.read_bytes() == again.read_bytes()
    for found in (load_file(path), read_safetensors(path)[0]):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
        assert all(found[name].dtype == tensors[name].dtype for name in tensors)
    assert read_safetensors(path)[1] == metadata


def test_files_have_the_permissions_of_any_other_file(tmp_path):
    (tmp_path / "plain").touch()
    write_safetensors(tmp_path / "weights", {"a": torch.ones(2)}, {})
    write_json(tmp_path / "json", {"a": [1, None]})
    assert json.loads((tmp_path / "json").read_text()) == {"a": [1, None]}
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    assert len(modes) == 1 and len(list(tmp_path.iterdir())) == 3


def test_a_full_disk_keeps_the_file_that_was_there(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": torch.ones(2)}, {})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(SalunError, match=r"Cannot write .*a\.safetensors: .*; what was there before is kept"):
            write_safetensors(path, {"a": torch.ones(10_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]


def test_what_a_killed_run_left_is_cleared(tmp_path):
    old, young = tmp_path / ".log.json.1.tmp", tmp_path / ".log.json.2.tmp"
    for left in (old, young, tmp_path / ".other.json.1.tmp"):
        left.write_text("half")
        os.utime(left, (0, 0)) if left != young else None
    write_json(tmp_path / "log.json", {})
    assert not old.exists() and young.exists() and (tmp_path / ".other.json.1.tmp").exists()


def test_writing_refuses(tmp_path):
    with pytest.raises(SalunError, match="Cannot write .*No such file or directory"):
        write_json(tmp_path / "no" / "x.json", {})
    with pytest.raises(SalunError, match="JSON cannot hold its content"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    with pytest.raises(SalunError, match="metadata 'a' must be text, not int"):
        write_safetensors(tmp_path / "x", {}, {"a": 1})
    with pytest.raises(SalunError, match="'a' has dtype torch.complex64"):
        write_safetensors(tmp_path / "x", {"a": torch.zeros(2, dtype=torch.complex64)}, {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"", "is empty; fetch or save it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "is a Git-LFS pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html><html></html>", "is a web page saved as weights; download the file itself"),
        (b"<html><body>404</body></html>", "is a web page saved as weights"),
        (b"PK\x03\x04\x00\x00\x08\x08" + b"\0" * 99, r"is a zip archive, as torch\.save writes \(a pickle\); only"),
        (b"\x80\x04\x95\x0b\x00\x00\x00\x00" + b"\x00" * 99, "is a pickle, which can run code when loaded; only saf"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "is a pickle"),
        (b"\x07" * 99, "has no safetensors header; it is damaged or another kind of file"),
        (struct.pack("<Q", 100_000_001) + b"{" * 9, "claims a header of 100000001 bytes where safetensors allows 10"),
        (struct.pack("<Q", 500) + b'{"a":', "is cut short inside its header: at least 508 bytes expected, 13 found"),
        (struct.pack("<Q", 9) + b'{"a": no}', "has a garbage safetensors header"),
        (struct.pack("<Q", 8) + b'{"a": 1}', "has a garbage safetensors header"),
        (struct.pack("<Q", 13) + b'{"a": {}}    ', "has a garbage safetensors header"),
    ],
)
def test_reading_names_the_fault(tmp_path, content, sentence):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(SalunError, match=sentence) as caught:
        read_safetensors(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_reading_names_what_is_missing_cut_or_broken(tmp_path):
    path = tmp_path / "weights.safetensors"
    with pytest.raises(SalunError, match="does not exist; check the path"):
        read_safetensors(path)
    with pytest.raises(SalunError, match="is a folder; give the safetensors file inside it"):
        read_safetensors(tmp_path)
    broken = torch.tensor([1.0, float("nan")])
    write_safetensors(path, {"a": broken, "b": torch.ones(2), "c": broken.half() * float("inf")}, {})
    with pytest.raises(SalunError, match="holds NaN or Inf in a, c; a sound file has none"):
        read_safetensors(path)
    write_safetensors(path, {"a": torch.ones(100)}, {})
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(SalunError, match=f"is cut short: {len(whole)} bytes expected, {len(whole) - 100} found"):
        read_safetensors(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(SalunError, match=f"bytes after its end: {len(whole)} bytes expected, {len(whole) + 1} found"):
        read_safetensors(path)
    path.write_bytes(whole.replace(b'"shape":[100]', b'"shape":[101]'))
    with pytest.raises(SalunError, match="is not a valid safetensors file"):
        read_safetensors(path)


def test_a_header_that_starts_like_a_pickle_is_no_pickle(tmp_path):
    path = tmp_path / "weights.safetensors"
    write_safetensors(path, {"a": torch.ones(1)}, {"pad": ""})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    write_safetensors(path, {"a": torch.ones(1)}, {"pad": "x" * (0x280 - length)})
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert torch.equal(read_safetensors(path)[0]["a"], torch.ones(1))


def test_listed():
    assert listed(["b", "a"]) == "a, b"
    assert listed([str(i) for i in range(9)], at_most=3) == "0, 1, 2 and 6 more"


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, salun_diffusion; print([name for name in ('torch', 'diffusers', 'numpy') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "[]\n"
    assert salun_diffusion.__version__ == "0.1.0" and "load_erasure" in dir(salun_diffusion)
    with pytest.raises(AttributeError, match="has no attribute 'load'"):
        _ = salun_diffusion.load
