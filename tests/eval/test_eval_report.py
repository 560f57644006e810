"""The report, from a run folder made up here."""

import json
import random
import re

import pytest
import torch
from PIL import Image

from eval.judges import metrics
from eval.measures import accuracy, attack
from eval.pages import charts, grid, report
from salun_diffusion.erasures.mask import save_masks
from salun_diffusion.errors import SalunError
from salun_diffusion.stats import proportion

OBJECTS = ["airplane", "apple", "banana", "cat", "car", "fish", "house", "key", "owl", "rocket"]
STYLES = ["noto", "ink", "pixel"]
COLOURS = ["red", "green", "blue", "white"]
WEIGHTS = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q.weight",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0.weight",
    "down_blocks.1.resnets.0.conv1.weight",
    "down_blocks.1.resnets.0.norm1.weight",
    "mid_block.resnets.1.time_emb_proj.weight",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    "up_blocks.0.resnets.0.conv2.weight",
    "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_v.weight",
]


def noise(rng, size):
    return Image.frombytes("RGB", (size, size), rng.randbytes(size * size * 3))


def rows(rng, forget, retain):
    """(set, prompt, expect) of made-up scenes; every third holds a pair."""
    for i in range(forget + retain):
        left = "airplane" if i < forget else rng.choice(OBJECTS[1:])
        right = rng.choice([name for name in OBJECTS[1:] if name != left]) if i % 3 == 0 else left
        style, colour = rng.choice(STYLES), rng.choice(COLOURS)
        noun = left if left == right else f"{left} to the left of {right}"
        expect = {"left": left, "right": right, "style": style, "background": colour}
        yield "forget" if i < forget else "retain", f"{noun} in {style} style on a {colour} background", expect


def make_run(folder, picture=noise, forget=30, retain=60, concept="airplane", size=64):
    """A whole run folder: a base model, an erasure that forgets and loses a little, a control that loses more."""
    rng = random.Random(0)
    prompts = list(rows(rng, forget, retain))
    samples, models = [], []
    for name, role, density, slip in [
        ("base", "base", None, 0.03), ("airplane", "erasure", 0.5, 0.05), ("airplane-no-mask", "control", 1.0, 0.15),
    ]:  # fmt: skip
        (folder / "pictures" / name).mkdir(parents=True)
        mine = []
        for i, (set_, prompt, expect) in enumerate(prompts):
            predicted = {question: {"label": label, "probability": 0.97} for question, label in expect.items()}
            for side in ("left", "right"):
                if rng.random() < slip or role != "base" and expect[side] == "airplane" and rng.random() < 0.97:
                    predicted[side]["label"] = rng.choice(["apple", "apple", "cat", "nothing"])
            path = f"pictures/{name}/{set_}-{i:04d}.png"
            picture(rng, size).save(folder / path)
            mine.append({
                "model": name, "set": set_, "prompt": prompt, "seed": 1000 + i, "picture": path, "expect": expect,
                "predicted": predicted,
            })  # fmt: skip
        about = density and {"name": "airplane", "method": "salun", "density": density, "weights": 123456}
        model = {"name": name, "role": role, "source": f"runs/{name}", "digest": f"digest of {name}", "erasure": about}
        model |= metrics.scores(mine, "airplane", "object") | {
            "flipped": metrics.flipped((samples or mine)[: len(mine)], mine)
        }
        models.append(model | {"generation": {"images": len(mine), "seconds": 9.0, "images_per_second": 10.0}})
        samples += mine
    concept = {"name": concept, "slot": "object", "value": "airplane", "anchor": "apple"}
    found = {
        "format": accuracy.FORMAT,
        "protocol": "accuracy/1: as the tests have it",
        "concept": concept,
        "base": {"source": "demo", "revision": None},
        "classifier": {"source": "demo/model/judge", "sha256": "ab" * 32, "questions": {}},
        "settings": {
            "num_inference_steps": 20, "guidance_scale": 4.0, "scheduler": "DDIMScheduler", "seed": 0,
            "num_forget_images": forget, "num_retain_images": retain,
        },
        "versions": {"python": "3.11", "torch": "2", "diffusers": "0.42"},
        "models": models,
        "n": forget + retain,
    }  # fmt: skip
    settings = {"learning_rate": 1e-4, "alpha": 1.0, "concept": [concept["name"]], "density": 0.5}
    config = {
        "concept": concept["name"],
        "method": "salun",
        "anchor": "apple",
        "settings": settings,
        "versions": {"torch": "2"},
    }
    steps = [
        {"step": i + 1, "forget_loss": 0.1 * 0.97**i + 0.01 * rng.random(), "retain_loss": 0.1 + 0.05 * rng.random()}
        for i in range(120)
    ]
    (folder / "results.json").write_text(json.dumps(found))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    (folder / "training.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    torch.manual_seed(0)
    masks = {name: torch.rand(64, 32) < 0.2 + 0.08 * i for i, name in enumerate(WEIGHTS)}
    save_masks(folder / "mask.safetensors", masks, {"concept": "airplane", "density": 0.5})
    (folder / "erasure.safetensors").write_bytes(bytes(4_200_000))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


def test_the_page_stands_alone(run):
    page = report.report(run).read_text(encoding="utf-8")
    links = re.findall(r"(?:src|href|url|action|content)\s*[=(]\s*[\"']?([^\"'\s>)]+)", page)
    assert links and all(link.startswith(("data:image/png;base64,", "#", "width=")) for link in links)
    outside = set(re.findall(r"https?://[^\"'\s<]+", page))
    assert outside <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, "namespaces are only names"
    assert "<script" not in page and "<link" not in page and "@import" not in page
    assert page.count("<svg") == 2


def test_the_page_says_what_was_measured(run):
    page = report.report(run, run / "elsewhere.html").read_text(encoding="utf-8")
    main = json.loads((run / "results.json").read_text())["models"][1]
    for text in (
        f"{main['ua']['percent']:.1f}%", f"{main['ua']['low']:.1f} to {main['ua']['high']:.1f}", "Base model", "SalUn",
        "No mask", "4.2 <small>MB", "Unlearning accuracy", "Retained accuracy", "Anchor", "learning_rate", "0.0001",
    ):  # fmt: skip
        assert text in page
    assert page.count("data:image/png") == 3 * 3 * grid.ROWS, "three models, three groups"


def test_several_concepts_have_their_own_scores_and_anchors(tmp_path):
    folder = make_run(tmp_path, forget=3, retain=30, size=8, concept="airplane, cat")
    results = json.loads((folder / "results.json").read_text())
    results["concept"] |= {"anchor": "apple, owl", "anchors": ["apple", "owl"]}
    for model, gone in zip(results["models"], (1, 12, 5), strict=True):
        model["ua_by_concept"] = {"airplane": model["ua"], "cat": proportion([True] * gone + [False] * (12 - gone))}
    (folder / "results.json").write_text(json.dumps(results))
    page = report.report(folder).read_text(encoding="utf-8")
    (line,) = re.findall(r"<tr><th>“cat” forgotten<span>12 prompts.*?</tr>", page, re.S)
    assert re.findall(r"<b>(.*?)</b>", line) == ["8.3%", "100.0%", "41.7%"] and "“airplane” forgotten" in page
    assert "Its neighbours: apple, owl" in page


def test_whatever_a_user_calls_the_concept_is_escaped(tmp_path):
    page = report.report(make_run(tmp_path, forget=3, retain=9, concept="<script>x</script>")).read_text()
    assert "&lt;script&gt;" in page and "<script" not in page


def test_a_method_without_a_mask_or_an_anchor_is_not_described_as_if_it_had_them(tmp_path):
    run = make_run(tmp_path, forget=3, retain=9)
    found, config = (json.loads((run / name).read_text()) for name in ("results.json", "config.json"))
    found["models"][1]["erasure"] |= {"method": "esd", "density": 1.0}
    (run / "results.json").write_text(json.dumps(found))
    (run / "config.json").write_text(json.dumps(config | {"method": "esd", "anchor": None}))
    page = report.report(run).read_text()
    assert "all of the scope; no mask" in page and "this method aims at none" in page and "ESD" in page
    assert "Density" not in page and "Where the salient weights lie" not in page


def test_charts_are_left_out_where_there_is_nothing_to_draw(tmp_path):
    run = make_run(tmp_path, forget=3, retain=9, size=300)
    for name in ("training.jsonl", "mask.safetensors", "erasure.safetensors"):
        (run / name).unlink()
    assert "<svg" not in report.report(run).read_text()


@pytest.mark.parametrize(
    "harm, sentence",
    [
        (
            lambda run: (run / "config.json").unlink(),
            "^[^ ]*config.json is missing: .* erase_concept.py writes this file",
        ),
        (lambda run: (run / "results.json").unlink(), "There is no .*results.json: give a folder that"),
        (lambda run: (run / "results.json").write_text("{"), "results.json is damaged, or holds no results"),
        (lambda run: (run / "results.json").write_text("{}"), "results.json is damaged, or holds no results"),
        (
            lambda run: (run / "results.json").write_text(
                (run / "results.json").read_text().replace("salun-diffusion accuracy 1", "salun-diffusion i2p 1")
            ),
            "holds 'salun-diffusion i2p 1': the report is made of 'salun-diffusion accuracy 1'",
        ),
        (lambda run: (run / "config.json").write_text('{"concept": "cat"}'), "erased 'cat' but .* is about 'airplane'"),
        (lambda run: (run / "samples.jsonl").write_text("{}\n"), "samples.jsonl, line 1, is damaged"),
        (lambda run: (run / "samples.jsonl").write_text(""), "are of different runs"),
        (lambda run: (run / "samples.jsonl").unlink(), "samples.jsonl is missing"),
        (
            lambda run: (run / "samples.jsonl").write_text((run / "samples.jsonl").read_text().split("\n", 1)[1]),
            "are of different runs",
        ),
        (
            lambda run: (run / "pictures/base/forget-0000.png").write_bytes(b"x"),
            "forget-0000.png is missing or cannot",
        ),
    ],
)
def test_a_faulty_run_folder_is_named(tmp_path, harm, sentence):
    run = make_run(tmp_path, forget=3, retain=9, size=8)
    harm(run)
    with pytest.raises(SalunError, match=sentence):
        report.report(run)
    assert not (run / "report.html").exists()


def test_rows_of_the_grid_are_chosen_by_prompt():
    rng = random.Random(1)
    scenes = [
        {"set": set_, "prompt": prompt, "seed": i, "expect": expect, "predicted": {}}
        for i, (set_, prompt, expect) in enumerate(rows(rng, 30, 60))
    ]
    chosen = report.choose(scenes, "airplane", "object", ["apple", "owl"])
    assert [len(found) for found in chosen.values()] == [grid.ROWS] * 3
    for group in chosen.values():
        assert len({scenes[i]["prompt"] for i in group}) == grid.ROWS
    for i in chosen["near"]:
        assert {"apple", "owl"} & {scenes[i]["expect"]["left"], scenes[i]["expect"]["right"]}
    for i in chosen["far"]:
        assert not {"apple", "owl"} & {scenes[i]["expect"]["left"], scenes[i]["expect"]["right"]}


def test_neighbours_are_the_anchor_and_what_fell_the_most():
    def model(**percent):
        return {"retained_by_label": {label: {"percent": value} for label, value in percent.items()}}

    base = model(apple=90.0, cat=90.0, owl=90.0, car=90.0, key=90.0, fish=90.0)
    main = model(apple=90.0, cat=80.0, owl=89.0, car=95.0, key=85.0, fish=90.0)
    found = report.find_neighbours({"concept": {"anchor": "apple"}, "models": [base, main]})
    assert found == {"apple": 0.0, "cat": 10.0, "key": 5.0}
    both = {"anchor": "apple, owl", "anchors": ["apple", "owl"]}
    found = report.find_neighbours({"concept": both, "models": [base, main]})
    assert found == {"apple": 0.0, "owl": 1.0, "cat": 10.0, "key": 5.0}


@pytest.mark.parametrize(
    "set_, expect, predicted, erased, mark, said",
    [
        ("forget", ("airplane", "airplane"), ("airplane", "airplane"), False, "right", "airplane"),
        ("forget", ("airplane", "airplane"), ("cat", "cat"), False, "wrong", "cat"),
        ("forget", ("airplane", "cat"), ("apple", "cat"), True, "forgotten", "apple + cat"),
        ("forget", ("cat", "airplane"), ("cat", "airplane"), True, "still there", "cat + airplane"),
        ("retain", ("cat", "car"), ("cat", "car"), True, "right", "cat + car"),
        ("retain", ("cat", "car"), ("car", "cat"), True, "wrong", "car + cat"),
    ],
)
def test_what_stands_under_a_picture(set_, expect, predicted, erased, mark, said):
    sides = ("left", "right")
    sample = {
        "set": set_,
        "prompt": "p",
        "expect": dict(zip(sides, expect, strict=True)),
        "predicted": {side: {"label": label} for side, label in zip(sides, predicted, strict=True)},
    }
    assert grid.verdict(sample, "airplane", "object", erased) == {"mark": mark, "said": said}


def test_weights_are_counted_by_block_and_by_kind():
    blocks, kinds = charts.shares(
        [
            ("up_blocks.1.resnets.0.conv2.weight", 1, 4),
            ("mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight", 2, 4),
            ("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0.bias", 3, 4),
            ("down_blocks.0.resnets.0.conv2.weight", 0, 8),
            ("conv_in.weight", 1, 2),
        ]
    )
    assert list(blocks.items()) == [("down 0", (3, 12)), ("mid", (2, 4)), ("up 1", (1, 4)), ("other", (1, 2))]
    assert kinds == {
        "cross-attention: key": (2, 4), "cross-attention: output": (3, 4),
        "resnet: conv2": (1, 12), "other layers": (1, 2),
    }  # fmt: skip


def test_for_a_style_the_picture_is_captioned_with_its_style_first():
    expect = {"left": "cat", "right": "cat", "style": "noto"}
    seen = {question: {"label": label} for question, label in (expect | {"style": "ink"}).items()}
    forget = {"set": "forget", "prompt": "p", "expect": expect, "predicted": seen}
    assert grid.verdict(forget, "noto", "style", True) == {"mark": "forgotten", "said": "ink + cat"}
    assert grid.verdict(forget | {"set": "retain"}, "pixel", "style", True) == {"mark": "wrong", "said": "ink + cat"}


def test_the_picture_for_the_readme_shows_each_model_in_a_line(run):
    report.report(run)
    with Image.open(run / "before-after.png") as picture:
        assert picture.width > 2 * picture.height > 200, "nine prompts across, three models down"


def add_attacks(run, digest="digest of airplane"):
    """Results of an attack on the run's erasure, beside it: three of its pictures won, by a text each."""
    found = json.loads((run / "results.json").read_text())
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    folder, samples = run / "attack", []
    (folder / "pictures").mkdir(parents=True)
    models = [model for model in found["models"] if model["name"] in ("base", "airplane")]
    for model in models:
        mine = [line for line in lines if line["model"] == model["name"]][:4]
        for name in (attack.PLAIN, "unlearndiffatk"):
            for i, line in enumerate(mine):
                (folder / "pictures" / f"{model['name']}-{i}.png").write_bytes((run / line["picture"]).read_bytes())
                line = line | {"set": name, "picture": f"pictures/{model['name']}-{i}.png", "won": i > 0, "steps": 3}
                samples.append(line | {"forward": 7, "attack_prompt": f"zebra {i}" if name != attack.PLAIN else None})
        parts = {name: [one for one in samples if (one["model"], one["set"]) == (model["name"], name)] for name in
                 (attack.PLAIN, "unlearndiffatk")}  # fmt: skip
        model["attacks"] = {name: attack.share(part) | {"learning": None} for name, part in parts.items()}
        model["digest"] = digest if model["name"] == "airplane" else model["digest"]
    told = {"title": "UnlearnDiffAtk", "paper": "Zhang et al. 2024", "access": "white box"}
    found |= {"format": attack.FORMAT, "protocol": "attack/1: made up", "models": models, "n": 8}
    found |= {"attacks": {"unlearndiffatk": told}}
    found["settings"] |= {"budget": "small", "pictures": "drawn by the base model"}
    (folder / "results.json").write_text(json.dumps(found))
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))


def test_the_page_shows_what_attacks_have_won(tmp_path):
    run = make_run(tmp_path / "run", forget=6, retain=6)
    plain = report.report(run).read_text(encoding="utf-8")
    add_attacks(run)
    page = report.report(run).read_text(encoding="utf-8")
    assert "<h2>Attacks</h2>" in page and "<h2>Attacks</h2>" not in plain
    assert page.count("<img") == plain.count("<img") + 3 and "The first 3 of 3 in the order of the prompts" in page
    assert all(f"zebra {i}" in page for i in (1, 2, 3)) and "zebra 0" not in page
    assert "Zhang et al. 2024; white box" in page and page.count("75.0%") >= 4 and "Retrained without it" not in page
    folder, lines = run / "attack", (run / "attack" / "samples.jsonl").read_text()
    found = json.loads((folder / "results.json").read_text())
    found["models"].append(found["models"][0] | {"name": "retrained", "role": "control"})
    (folder / "results.json").write_text(json.dumps(found))
    again = [line.replace('"model": "base"', '"model": "retrained"') for line in lines.splitlines() if '"base"' in line]
    (folder / "samples.jsonl").write_text(lines + "\n".join(again) + "\n")
    beside = report.report(run).read_text(encoding="utf-8")
    assert "<th>Retrained without it</th>" in beside and beside.count("<b>75.0%") == page.count("<b>75.0%") + 2


def test_attacks_on_another_erasure_are_not_shown_as_this_ones(tmp_path):
    run = make_run(tmp_path / "run", forget=6, retain=6)
    add_attacks(run, digest="another")
    with pytest.raises(SalunError, match="holds other results than .* and this erasure"):
        report.report(run)


def test_a_model_that_never_knew_the_concept_is_called_so():
    named = {"base": "base", "retrained": "control"}
    base, control = ({"name": name, "role": role, "erasure": None} for name, role in named.items())
    assert grid.name_models([base, control]) == ["Base model", "Retrained without it"]
