"""The report's charts as SVG text that takes its colours for lettering and lines from the page around it."""

import io
import re
import textwrap
from collections.abc import Iterable

import matplotlib
from PIL import Image

from salun_diffusion.colours import BLUE, GREY, ORANGE

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first)

INK = "#123456"  # stands for the page's own text colour until the SVG is written
STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 3,
    "legend.frameon": False,
}

LINES = (GREY, BLUE, ORANGE, "#1a9e77", "#9b5fc0", "#c2382e")  # of several curves in one chart, the base's first

BLOCKS = re.compile(r"(down|up)_blocks?\.(\d+)\.|(mid)_block")
KINDS = [  # (what a parameter's name contains, how a reader calls it), the first that fits
    (r"attn2\.to_q", "cross-attention: query"),
    (r"attn2\.to_k", "cross-attention: key"),
    (r"attn2\.to_v", "cross-attention: value"),
    (r"attn2\.to_out", "cross-attention: output"),
    (r"attn1\.", "self-attention"),
    (r"resnets\.\d+\.conv1", "resnet: conv1"),
    (r"resnets\.\d+\.conv2", "resnet: conv2"),
    (r"resnets\.\d+\.conv_shortcut", "resnet: shortcut"),
    (r"resnets\.\d+\.time_emb_proj", "resnet: time"),
    (r"resnets\.\d+\.norm", "resnet: norm"),
    (r"", "other layers"),
]


def block_of(name: str) -> str:
    """A parameter's place in a U-Net: "down 0", "mid", "up 2", or "other" for the layers outside its blocks."""
    found = BLOCKS.search(name)
    if not found:
        return "other"
    return "mid" if found[3] else f"{found[1]} {found[2]}"


def kind_of(name: str) -> str:
    """What the layer of a parameter does, in words."""
    return next(kind for pattern, kind in KINDS if re.search(pattern, name))


def shares(rows: Iterable[tuple[str, int, int]]) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int]]]:
    """``(parameter name, kept, total)`` → ``(kept, total)`` by block and by kind, both in the order of the data."""
    blocks: dict[str, tuple[int, int]] = {}
    kinds: dict[str, tuple[int, int]] = {}
    for name, kept, total in rows:
        for groups, key in ((blocks, block_of(name)), (kinds, kind_of(name))):
            before = groups.get(key, (0, 0))
            groups[key] = (before[0] + kept, before[1] + total)
    flow = {"down": 0, "mid": 1, "up": 2, "other": 3}
    order = [kind for _, kind in KINDS]
    return (
        dict(sorted(blocks.items(), key=lambda item: (flow[item[0].split()[0]], int((item[0].split() + ["0"])[1])))),
        dict(sorted(kinds.items(), key=lambda item: order.index(item[0]))),
    )


def saliency(rows: Iterable[tuple[str, int, int]]) -> str:
    """Bars: the share of the weights that the mask lets move, by block and by kind of layer."""
    blocks, kinds = shares(rows)
    kept, total = (sum(values) for values in zip(*blocks.values(), strict=True))
    with plt.rc_context(STYLE):
        tallest = max(len(blocks), len(kinds))
        figure, axes = plt.subplots(1, 2, figsize=(9.6, 0.6 + 0.3 * tallest), width_ratios=(1, 1), layout="constrained")
        for axis, groups, colour, title in zip(
            axes,
            (blocks, kinds),
            (BLUE, ORANGE),
            ("by block, in the order of the data", "by kind of layer"),
            strict=True,
        ):
            percent = [100 * some / of if of else 0 for some, of in groups.values()]
            axis.barh(range(len(groups)), percent, color=colour, height=0.68)
            for y, (share, (_, of)) in enumerate(zip(percent, groups.values(), strict=True)):
                # in a column of their own, where the dashed line does not run through them
                axis.text(
                    1.01,
                    y,
                    f"{share:.0f}% of {_short(of)}",
                    transform=axis.get_yaxis_transform(),
                    va="center",
                    fontsize=8,
                )
            axis.axvline(100 * kept / total, color=GREY, linestyle="--", linewidth=1)
            axis.set_yticks(range(len(groups)), list(groups))
            axis.tick_params(axis="y", length=0)
            axis.set_ylim(len(groups) - 0.4, -0.6)
            axis.set_xlim(0, 1.02 * max(percent))
            axis.set_xlabel("weights kept, %")
            axis.set_title(title, loc="left", fontsize=9)
        return _svg(figure, "saliency")


def losses(lines: list[dict]) -> str:
    """Curves: the forget and the retain loss of every step, faint, and their running means."""
    window = max(1, len(lines) // 20)
    steps = [line["step"] for line in lines]
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(9.6, 2.9), layout="constrained")
        for key, colour, label in (("forget_loss", BLUE, "forget loss"), ("retain_loss", ORANGE, "retain loss")):
            values = [line[key] for line in lines]
            means = [
                sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i + 1 - window) : i + 1])
            ]
            axis.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
            axis.plot(steps, means, color=colour, linewidth=1.8, label=label)
        if all(line["forget_loss"] > 0 and line["retain_loss"] > 0 for line in lines):
            axis.set_yscale("log")
        axis.set_xlabel("optimizer step")
        axis.set_ylabel("mean squared error")
        axis.margins(x=0.01)
        figure.legend(loc="outside upper right", ncols=2)
        return _svg(figure, "losses")


def relearning(models: list[dict], titles: list[str], dashed: list[bool]) -> str:
    """Curves by optimizer steps, with their 95% bands: what is learned again, and what is kept of everything else.

    Args:
        models: as ``relearn`` has them.
        titles: what each is called.
        dashed: which of them are controls.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.4), sharey=True, layout="constrained")
        shares = (lambda point: point["accuracy"], lambda point: next(iter(point["retained"].values()), None))
        heads = ("shows what is learned, %", "everything else is drawn right, %")
        for axis, share, head in zip(axes, shares, heads, strict=True):
            for number, (model, title, control) in enumerate(zip(models, titles, dashed, strict=True)):
                points = [(point["step"], found) for point in model["curve"] if (found := share(point))]
                steps, style = [step for step, _ in points], "--" if control else "-"
                values = {key: [found[key] for _, found in points] for key in ("percent", "low", "high")}
                colour = LINES[number % len(LINES)]
                axis.plot(
                    steps, values["percent"], style, color=colour, marker="o", markersize=3.5, linewidth=1.6,
                    label=title if axis is axes[0] else None,
                )  # fmt: skip
                axis.fill_between(steps, values["low"], values["high"], color=colour, alpha=0.1, linewidth=0)
            axis.set_xlabel("optimizer steps of fine-tuning")
            axis.set_title(head, loc="left", fontsize=9)
            axis.set_ylim(-3, 103)
        figure.legend(loc="outside lower center", ncols=3)
        return _svg(figure, "relearning")


def activations(layers: list[str], models: list[dict], titles: list[str]) -> str:
    """Bars: how much each attention block's output changes, for each condition of ``probe``; a panel for each model."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(models), figsize=(9.6, 1.2 + 0.42 * len(layers)), sharex=True, sharey=True, squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for axis, model, title in zip(axes[0], models, titles, strict=True):
            for number, (name, colour) in enumerate((("concept", BLUE), ("neighbours", ORANGE), ("nothing", GREY))):
                if (change := model["change"].get(name)) is None:  # a concept of a file may have no neighbours
                    continue
                places = [place + 0.27 * (number - 1) for place in range(len(layers))]
                axis.barh(
                    places, change["layers"], height=0.25, color=colour,
                    label=name if axis is axes[0][0] else None,
                )  # fmt: skip
            axis.set_yticks(range(len(layers)), [f"{block_of(f'{layer}.')} · {layer[-1]}" for layer in layers])
            axis.tick_params(axis="y", length=0)
            axis.set_ylim(len(layers) - 0.4, -0.6)
            axis.set_xlabel("‖erased − base‖ / ‖base‖, %")
            axis.set_title(title, loc="left", fontsize=9)
        figure.legend(loc="outside lower center", ncols=3)
        return _svg(figure, "activations")


def _short(count: int) -> str:
    """12345 → "12k"."""
    for size, letter in ((1_000_000, "M"), (1000, "k")):
        if count >= size:
            return f"{count / size:.1f}{letter}" if count < 10 * size else f"{count / size:.0f}{letter}"
    return str(count)


def _svg(figure: plt.Figure, salt: str) -> str:
    """The figure as an ``<svg>`` element that scales with the page; ``salt`` keeps two charts' ids apart."""
    buffer = io.StringIO()
    with plt.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(
        r"font: (?:[\d.]+px|(\w+ )*[\d.]+px) [^;\"]*", lambda m: m[0].split("px")[0] + "px inherit-family", text
    )
    text = text.replace("inherit-family", "system-ui, sans-serif")
    return re.sub(
        r'(<svg[^>]*?) (?:width|height)="[^"]*"([^>]*?) (?:width|height)="[^"]*"', r'\1\2 role="img"', text, count=1
    )


def before_after(blocks: list[tuple[list[str], list[tuple[str, list]]]]) -> Image.Image:
    """One picture of many: for each block a line of pictures for each model's title, a column for each ``(prompt, PIL
    pictures)``; blocks stand below one another.
    """
    sheets = []
    for titles, columns in blocks:
        figure, grid = plt.subplots(
            len(titles), len(columns), figsize=(1.25 * len(columns) + 0.6, 1.25 * len(titles) + 0.5), dpi=120,
            squeeze=False,
        )  # fmt: skip
        for across, (prompt, pictures) in enumerate(columns):
            for down, picture in enumerate(pictures):
                axis = grid[down][across]
                axis.imshow(picture, interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
                if down == 0:
                    axis.set_title("\n".join(textwrap.wrap(prompt, 21)), fontsize=6.5, verticalalignment="bottom")
                if across == 0:
                    axis.set_ylabel("\n".join(textwrap.wrap(titles[down], 16)), fontsize=8)
        figure.tight_layout(pad=0.4, h_pad=0.3, w_pad=0.3)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.05)  # whole titles, however many lines
        plt.close(figure)
        sheets.append(Image.open(buffer).convert("RGB"))
    sheet = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
    for number, part in enumerate(sheets):
        sheet.paste(part, (0, sum(s.height for s in sheets[:number])))
    return sheet
