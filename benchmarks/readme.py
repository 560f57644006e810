"""benchmarks/README.md from the result files beside it."""

import json
from pathlib import Path

from salun_diffusion.tables import markdown, put_into

HERE = Path(__file__).parent
CARDS = {"24": 24 * 2**30, "80": 80e9}  # sold as such: bytes
SPARE = 1.5  # GB of a CUDA context, and of what the allocator loses to fragments


def write() -> None:
    """Put the tables of all result files between the two markers of README.md."""
    text = "\n".join(_section(json.loads(file.read_text())) for file in sorted(HERE.glob("results-*.json")))
    put_into(HERE / "README.md", "results", text)


def _section(found: dict) -> str:
    about = found.pop("about")
    lines = [f"### {about['processor']}, Python {about['python']}", ""]
    by_run: dict[str, list[str]] = {}
    for name, result in found.items():
        when = result.pop("measured")
        by_run.setdefault(f"`{when['command']}`, {when['date']}, torch {when['torch']}", []).append(name)
    lines += [f"- {run}: {', '.join(names)}" for run, names in by_run.items()] + [""]
    rows = [["what", "reference", "ours", "ratio"]]
    if "reference_step" in found and "our_step" in found:
        theirs, ours = found["reference_step"], found["our_step"]
        setting = ours["settings"]
        what = f"{setting['resolution']} px, batch {setting['batch_size']}, {setting['dtype']}"
        what += ", activations recomputed in both" if setting["gradient_checkpointing"] else ", nothing recomputed"
        rows.append(_row(f"one step ({what})", theirs["seconds"], ours["seconds"], "s"))
        rows.append(_row("peak memory of it", theirs["peak_gib"], ours["peak_gib"], "GiB"))
        floor, share = ours["floor_seconds"], ours["floor_seconds"] / ours["seconds"]
        rows.append(["the U-Net passes that a step needs, alone", "", f"{floor:.2f} s", f"{share:.2f} of our step"])
    if "mask" in found:
        m = found["mask"]
        scaled = "" if m["sorted"] == m["scores"] else f" (from {m['sorted'] / 1e6:.0f}M, scaled linearly)"
        rows.append(
            _row(f"mask from {m['scores'] / 1e6:.0f}M scores{scaled}", m["sort_seconds_scaled"], m["seconds"], "s")
        )
        own = m["scores"] / 2**30  # a byte for each score
        what = f"memory for it beside the scores, {own:.2f} GiB of it the mask"
        rows.append([what, "", f"{m['extra_gib']:.2f} GiB", ""])
    if "delta" in found:
        d = found["delta"]
        cores = f"{d['threads']} thread" + "s" * (d["threads"] > 1)
        rows.append(_row(f"first load in a process (density 0.5, {cores}), against the slow way",
                         d["first_slow_load_seconds"], d["first_load_seconds"], "s"))  # fmt: skip
        rows.append(_row("… in processor seconds", d["first_slow_load_cpu"], d["first_load_cpu"], "s"))
        rows.append(_row("… memory that it takes", d["first_slow_load_extra_gb"], d["first_load_extra_gb"], "GB"))
        for density in ("0.5", "0.1"):
            for what, name in (("later loads", "load"), ("taking it off", "unload")):
                slow, ours = (
                    [d[f"{how}{name}{clock}_{density}"] for clock in ("_seconds", "_cpu")] for how in ("slow_", "")
                )
                rows.append(_row(f"{what} (density {density}), against the slow way", slow[0], ours[0], "s"))
                rows.append(_row("… in seconds of the processors", slow[1], ours[1], "s"))
            file = d[f"file_mb_{density}"]
            rows.append(
                _row(f"file at density {density}, against the dense fp16 layers", d["dense_fp16_mb"], file, "MB")
            )
        rows.append(["turning a loaded erasure off", "", f"{d['off_seconds']:.2f} s", ""])
        rows.append(["turning on one that was on before", "", f"{d['on_seconds']:.2f} s", ""])
        rows.append(["loading the dense U-Net from the system's cache", "", f"{d['dense_load_seconds']:.2f} s", ""])
        rows.append(["one copy of those layers in memory", "", f"{d['copy_seconds']:.2f} s", ""])
    if "i2p" in found:
        rows += _evaluation(found["i2p"])
    if "accuracy" in found:
        a = found["accuracy"]
        ratio = f"{a['ours'] / a['plain']:.2g}×"
        speeds = (f"{a[side]:.3g} pictures/s" for side in ("plain", "ours"))
        rows.append([f"`eval accuracy`, base and one erasure ({a['how']})", *speeds, ratio])
    if "attack" in found:
        a = found["attack"]
        rows.append(_row(f"a step of an attack ({a['how']})", a["plain"], a["ours"], "s"))
    if "attack_memory" in found:
        a = found["attack_memory"]
        rows.append([f"memory of two attacks ({a['how']})", "", f"{a['peak_gib']:.2f} GiB", ""])
    lines.append(markdown(rows))
    counted = found.get("memory", {}) | found.get("attack_memory", {}).get("accounting", {})
    if counted:
        parts = next(iter(counted.values()))
        rows = [["GB at 512 px, by accounting", *parts]]
        for what, sizes in counted.items():
            rows.append([what, *(f"{sizes[part]:.2f}" if part in sizes else "" for part in parts)])
        lines += ["", markdown(rows)]
    if counted := found.get("flux_memory"):
        parts = next(iter(counted.values()))
        rows = [["Flux, GB at 1024 px, by accounting", *parts, "fits in GB"]]
        for what, sizes in counted.items():
            card = next((card for card, bytes_ in CARDS.items() if sizes["total"] < bytes_ / 1e9 - SPARE), "–")
            rows.append([what, *(f"{size:.1f}" for size in sizes.values()), card])
        lines += ["", markdown(rows)]
    return "\n".join([*lines, ""])


def _evaluation(found: dict) -> list[list[str]]:
    """`python -m eval i2p` against a loop over one prompt at a time."""
    plain, ours = found["plain"], found["ours"]
    return [
        _row(f"drawing {found['prompts']} prompts ({found['how']})", plain["draw"], ours["draw"], "s"),
        _row("looking for nudity in those pictures", plain["detect"], ours["detect"], "s"),
        _row("both: the whole I2P path", sum(plain.values()), sum(ours.values()), "s"),
        _row(f"looking for nudity in {found['photos']} photographs", found["photos_plain"], found["photos_ours"], "s"),
    ]


def _row(what: str, reference: float, ours: float, unit: str) -> list[str]:
    return [what, f"{reference:.2f} {unit}", f"{ours:.2f} {unit}", f"{reference / ours:.2g}×"]
