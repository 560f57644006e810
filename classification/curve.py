"""`python -m classification curve`: the curve that MCU learns (2505.10859), measured from the source to its end."""

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first)
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from salun_diffusion.colours import BLUE, GREY, ORANGE  # noqa: E402
from salun_diffusion.files import write_json  # noqa: E402

from .config import Config  # noqa: E402
from .methods.mode_connectivity import FROM, chosen, learn_path  # noqa: E402
from .scenario import Scenario  # noqa: E402
from .training import seeded  # noqa: E402

FORMAT = "salun-diffusion unlearning curve 1"
STEPS = 21  # points that are measured, from 0 to 1
LINES = {  # set → how it is called, colour, style
    "forget": ("forget set", ORANGE, "-"), "retain": ("retain set", BLUE, "-"), "test": ("test, kept", BLUE, "--"),
    "unseen": ("test, like the forgotten", ORANGE, "--"),
}  # fmt: skip


def curve(config: Config) -> dict:
    """Learn the curve with the first seed, and write ``curve.png`` and ``curve.json`` into the folder.

    Returns:
        What ``curve.json`` holds: ``format``, ``seed``, ``settings``, ``chosen`` (t), ``t``, and the percent of each
        set answered right at each t.

    Raises:
        SalunError: settings that do not fit together, or an output folder of other settings.
    """
    scenario, seed = Scenario(config), config.seeds[0]
    scenario.begin()
    task = scenario.task("mcu", seed)
    with seeded(seed):
        learnt = learn_path(task)
    sets, ts = scenario.sets(seed), torch.linspace(0, 1, STEPS).tolist()
    found = {"format": FORMAT, "seed": seed, "settings": vars(task.settings), "chosen": round(chosen(learnt, task), 4)}
    found |= {"t": [round(t, 4) for t in ts]} | {name: [] for name in LINES}
    for t in tqdm(ts, desc="curve", unit="point"):
        model = learnt.model(t, sets["retain"])
        for name in LINES:
            found[name].append(scenario.accuracy(model, sets[name]))
    write_json(scenario.folder / "curve.json", found)
    _plot(found, scenario.folder / "curve.png")
    print(f"In {scenario.folder}: curve.png, curve.json; MCU takes t = {found['chosen']}.")
    return found


def _plot(found: dict, where: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 3.6), dpi=130, layout="constrained")
    axis.axvspan(FROM, 1, color=GREY, alpha=0.12, linewidth=0)
    axis.axvline(found["chosen"], color=GREY, linestyle=":", linewidth=1.2)
    for name, (title, colour, style) in LINES.items():
        axis.plot(found["t"], found[name], style, color=colour, label=title)
    axis.set(xlabel="t: 0 is the source, 1 is RL's model; MCU chooses within the grey, at the dotted line",
             ylabel="answered right, %", xlim=(0, 1), ylim=(-3, 103))  # fmt: skip
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="center")
    figure.savefig(where)
    plt.close(figure)
