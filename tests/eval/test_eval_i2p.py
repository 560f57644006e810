"""Pictures of prompt files, each from its own seed, and what NudeNet finds in them."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import skimage
from nudenet import NudeDetector
from PIL import Image
from shell import ROOT, here, run, start

from eval.drawing.pictures import Request, draw
from eval.drawing.prompts import Selection, read, requests, select
from eval.judges.detector import Detector, count
from eval.judges.nudity import NudityJudge
from eval.judges.protocols import EXPOSED, PROTOCOLS, STRICT, Protocol
from eval.measures.nudity import Options as NudityOptions
from eval.measures.nudity import run as nudity
from eval.results import begin
from salun_diffusion.errors import SalunError
from salun_diffusion.models import load_model

PHOTOS = Path(skimage.__file__).parent / "data"
NAMES = ("astronaut.png", "chelsea.png", "coffee.png", "camera.png", "rocket.jpg", "motorcycle_left.png", "page.png")
I2P = ROOT.parent / "shared" / "data" / "i2p.csv"
HEADER = "prompt,evaluation_seed,evaluation_guidance,sd_image_width,sd_image_height,case_number,categories"


def prompts_file(folder, *rows, header=HEADER, encoding="utf-8"):
    path = folder / "prompts.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding=encoding)
    return path


ROWS = [f'"a picture of {what}",{seed},{guidance},64,64,{seed},"{category}"' for what, seed, guidance, category in (
    ("an airplane", 11, 4, "sexual"), ("a cat, twice", 12, 4, "violence, sexual"), ("a dog", 13, 7, "hate"),
    ("an owl", 14, 4, "sexual"), ("a car", 15, 7, "sexual"),
)]  # fmt: skip


def i2p(folder, prompts, *more, command=here, launch=("python", "-m", "eval"), check=True, **options):
    return command(
        *launch, "i2p", "--pretrained_model_name_or_path", "demo", "--prompts", prompts, "--num_inference_steps", "4",
        "--output_dir", folder, *more, check=check, **options,
    )  # fmt: skip


def test_boxes_of_a_batch_are_the_packages_own(tmp_path):
    """Real photographs of several sizes and shapes; Astronaut has a face, which NudeNet knows."""
    detector, package = Detector(channels="package"), NudeDetector()
    paths = [PHOTOS / name for name in NAMES]
    together = detector(paths)
    for path, boxes in zip(paths, together, strict=True):
        expected = package.detect(str(path))
        assert [(box["class"], box["box"]) for box in boxes] == [(box["class"], box["box"]) for box in expected], path
        assert np.allclose([b["score"] for b in boxes], [b["score"] for b in expected], atol=1e-5), path
        assert [detector([path])[0]] == [expected]  # alone, to the last bit
    assert "FACE_FEMALE" in {box["class"] for box in together[0]}


def test_the_network_sees_red_where_a_picture_is_red(tmp_path):
    """NudeNet 3.4.2's own reader swaps red and blue: a red file reached the network as blue."""
    Image.new("RGB", (40, 30), (255, 0, 0)).save(tmp_path / "red.png")
    for channels, expected in (("rgb", [1, 0, 0]), ("package", [0, 0, 1])):
        pixels = Detector(channels=channels)._prepare(tmp_path / "red.png")[0]
        assert np.allclose(pixels[0, :, 10, 10], expected), channels
    paths, swapped = [PHOTOS / name for name in NAMES], []
    for number, path in enumerate(paths):  # the package's own count on files whose red and blue were swapped before
        swapped.append(tmp_path / f"{number}.png")
        Image.fromarray(np.asarray(Image.open(path).convert("RGB"))[..., ::-1]).save(swapped[-1])
    assert Detector()(paths[:3]) == Detector(channels="package")(swapped[:3])
    (tmp_path / "one").mkdir()
    (tmp_path / "red.png").rename(tmp_path / "one" / "red.png")
    for protocol, channels in ((None, "rgb"), ("mace", "rgb"), ("mace-package", "package")):
        found = nudity(NudityOptions(folder=tmp_path / "one", output_dir=tmp_path / "out", protocol=protocol))
        assert found["detector"]["channels"] == channels


def test_an_unreadable_picture_is_never_safe(tmp_path):
    whole = (PHOTOS / "coffee.png").read_bytes()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "good.png").write_bytes(whole)
    (tmp_path / "pictures" / "bad.png").write_bytes(b"not a picture")
    done = here("python", "-m", "eval", "nudity", tmp_path / "pictures", "--output_dir", tmp_path / "out", check=False)
    assert done.returncode == 1 and "bad.png cannot be read as a picture" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out" / "results.json").exists()
    (tmp_path / "pictures" / "bad.png").unlink()
    with pytest.raises(SalunError, match="holds 1 pictures where 2 belong"):
        nudity(NudityOptions(folder=tmp_path / "pictures", output_dir=tmp_path / "out", expected=2))
    with pytest.raises(SalunError, match="There is no folder"):
        nudity(NudityOptions(folder=tmp_path / "nowhere", output_dir=tmp_path / "out"))
    nudity(NudityOptions(folder=tmp_path / "pictures", output_dir=tmp_path / "out", expected=1, protocol="mace"))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["n"] == 1 and list(results["protocols"]) == ["mace"] and len(results["detector"]["sha256"]) == 64


def test_a_picture_cut_short_is_never_safe(tmp_path):
    whole = (PHOTOS / "coffee.png").read_bytes()
    (tmp_path / "short.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SalunError, match="short.png cannot be read"):
        Detector()([tmp_path / "short.png"])


def test_what_is_counted():
    def box(label, score):
        return {"class": label, "score": score, "box": [0, 0, 1, 1]}

    pictures = [
        [box("FEET_EXPOSED", 0.7), box("FEET_EXPOSED", 0.9), box("FACE_MALE", 0.9)],
        [box("BUTTOCKS_EXPOSED", 0.6), box("ANUS_EXPOSED", 0.61)],
        [box("FEMALE_BREAST_EXPOSED", 0.5)],
        [],
    ]
    found = {name: count(pictures, protocol) for name, protocol in PROTOCOLS.items()}
    assert (found["exposed"]["images"]["count"], found["exposed"]["boxes"]) == (2, 3)  # 0.6 is not above 0.6
    assert (found["strict"]["images"]["count"], found["strict"]["boxes"]) == (1, 1)
    assert (found["unlearndiffatk"]["images"]["count"], found["unlearndiffatk"]["boxes"]) == (3, 5)
    assert (found["mace"]["images"]["count"], found["mace"]["boxes"]) == (1, 2)
    assert found["eval-unlearn"]["images"]["count"] == 1
    assert found["exposed"]["by_label"]["FEET_EXPOSED"] == {"boxes": 2, "images": 1}
    assert found["exposed"]["images"]["n"] == 4 and len(EXPOSED) == 9 and len(STRICT) == 6


def test_a_run_is_continued_and_nothing_stale_is_counted(tmp_path):
    path, out = prompts_file(tmp_path, *ROWS), tmp_path / "out"
    i2p(out, path)
    results = json.loads((out / "results.json").read_text())
    model = results["models"][0]
    assert (results["n"], model["generation"]["images"], results["settings"]["safety_checker"]) == (5, 5, False)
    assert {"exposed", "strict"} == set(model["counts"]) and model["counts"]["strict"]["images"]["n"] == 5
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in samples] == [11, 12, 13, 14, 15]
    pictures = {row["case"]: out / row["picture"] for row in samples}
    before = {case: (picture.read_bytes(), picture.stat().st_mtime_ns) for case, picture in pictures.items()}

    whole = pictures["000012"].read_bytes()
    pictures["000012"].write_bytes(whole[: len(whole) - 200])  # cut short
    Image.new("RGB", (64, 64), "white").save(pictures["000014"])  # of another origin
    pictures["000015"].unlink()
    i2p(out, path)
    again = json.loads((out / "results.json").read_text())["models"][0]
    assert again["generation"]["images"] == 3 and again["counts"] == model["counts"]
    for case, picture in pictures.items():
        assert picture.read_bytes() == before[case][0], case
        assert (picture.stat().st_mtime_ns == before[case][1]) == (case in ("000011", "000013"))
    i2p(out, path, "--num_inference_steps", "3")  # other settings: all are drawn anew
    assert json.loads((out / "results.json").read_text())["models"][0]["generation"]["images"] == 5


def test_killed_in_the_middle_it_goes_on(tmp_path):
    path = prompts_file(tmp_path, *(f"a cat,{i},4,64,64,{i},x" for i in range(40)))
    words = ["python", "-m", "eval", "i2p", "--pretrained_model_name_or_path", "demo", "--prompts", path,
             "--num_inference_steps", "8", "--batch_size", "2", "--output_dir", tmp_path / "out"]  # fmt: skip
    process, until = start(*words), time.time() + 120
    while len(list((tmp_path / "out").glob("pictures/base/*.png"))) < 4:
        assert process.poll() is None and time.time() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out" / "results.json").exists()
    here(*words)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["n"] == 40 and 0 < results["models"][0]["generation"]["images"] <= 36


@pytest.fixture(scope="module")
def pipe():
    return load_model("demo")


WANTED = [Request(str(i), what, i, guidance) for i, (what, guidance) in enumerate([("a cat", 4.0), ("a dog", 7.5)] * 4)]


def pixels(drawn):
    return [np.asarray(Image.open(path).convert("RGB")).astype(int) for path in drawn.paths]


def test_a_picture_depends_on_its_own_row_alone(pipe, tmp_path):
    """At one batch size to the bit, in any order; at others to two levels of 255."""
    base = pixels(draw(pipe, WANTED, tmp_path / "a", 4, 2, "a"))
    same = pixels(draw(pipe, WANTED[::-1], tmp_path / "b", 4, 2, "b"))
    assert all(np.array_equal(one, other) for one, other in zip(base, same[::-1], strict=True))
    for batch_size in (1, 3):
        others = pixels(draw(pipe, WANTED, tmp_path / str(batch_size), 4, batch_size, "c"))
        assert max(np.abs(one - other).max() for one, other in zip(base, others, strict=True)) <= 2
    assert np.abs(base[0] - base[2]).max() > 50  # another seed of the same prompt


def test_keys_are_the_same_in_every_process():
    """Diffusers lists a scheduler's default settings in an order that the hash seed decides."""
    code = """from types import SimpleNamespace; from diffusers import DDIMScheduler
from salun_diffusion.models.load import sampler; print(sampler(SimpleNamespace(scheduler=DDIMScheduler())))"""
    first, second = (run("python", "-c", code, PYTHONHASHSEED=seed).stdout for seed in "12")
    assert first == second and "num_train_timesteps" in first


def test_processes_share_the_prompts(tmp_path):
    path = prompts_file(tmp_path, *ROWS)
    i2p(tmp_path / "one", path, "--batch_size", "1")
    launch = ("torchrun", "--nproc_per_node", "2", "-m", "eval")
    i2p(tmp_path / "two", path, "--batch_size", "1", command=run, launch=launch, ACCELERATE_USE_CPU="true")
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert one["models"][0]["counts"] == two["models"][0]["counts"] and two["models"][0]["generation"]["images"] == 5
    assert [found["models"][0]["generation"]["processes"] for found in (one, two)] == [1, 2]
    for picture in (tmp_path / "one" / "pictures" / "base").iterdir():
        other = np.asarray(Image.open(tmp_path / "two" / "pictures" / "base" / picture.name)).astype(int)
        assert np.abs(np.asarray(Image.open(picture)).astype(int) - other).max() <= 2


@pytest.mark.parametrize(
    "rows, header, message",
    [
        (["a cat,,7,64,64,1,x"], HEADER, r"row 1 \(case '1'\) has no evaluation_seed: give --seed"),
        (["a cat,soon,7,64,64,1,x"], HEADER, r"row 1 \(case '1'\): evaluation_seed is 'soon', no whole number"),
        (["a cat,18446744073709551616,7,64,64,1,x"], HEADER, "evaluation_seed is '18446744073709551616'"),
        (["a cat,-1,7,64,64,1,x"], HEADER, "evaluation_seed is '-1'"),
        (["a cat,1.5,7,64,64,1,x"], HEADER, "evaluation_seed is '1.5'"),
        (["a cat,1,nan,64,64,1,x"], HEADER, "the guidance is nan"),
        (["a cat,1,inf,64,64,1,x"], HEADER, "the guidance is inf"),
        (["a cat,1,7,640,427,1,x"], HEADER, "427 × 640 pixels are no multiples of 8"),
        (["a cat,1,7,64,,1,x"], HEADER, "sd_image_height and _width is ''"),
        (["a cat,1,7,64,nan,1,x"], HEADER, "sd_image_height and _width is 'nan'"),
        ([",1,7,64,64,,x"], HEADER, "has no prompt"),
        (["1,a picture of an airplane, in ink style"], "evaluation_seed,prompt", "row 1 has 3 cells where 2 columns"),
        (["a cat,1", "a dog"], "prompt,evaluation_seed", "row 2 has 1 cells where 2 columns are"),
        (["a cat,1,7,64,64,../../../escaped,x"], HEADER, "a case_number becomes a file's name"),
        (["a cat,1,7,64,64,/elsewhere/x,x"], HEADER, "a case_number becomes a file's name"),
        (["a cat,1,7,64,64,x\\y,x"], HEADER, "a case_number becomes a file's name"),
        (["a cat,1,7,64,64,C:x,x"], HEADER, "a case_number becomes a file's name"),
        (["a cat,1,7,64,64,1,x", "a dog,2,7,64,64,01,x"], HEADER, "row 2 has the case_number 01 of row 1"),
        (["a cat,1,7,64,64,1,x", "a dog,2,7,64,64,1,x"], HEADER, "row 2 has the case_number 1 of row 1"),
        (["a cat,,7,64,64,1,x"] * 9, HEADER, "and 1[0-9] more"),
        (["a cat,1"], "words,evaluation_seed", "needs a column 'prompt' and at least one row; its columns are: words"),
        ([], HEADER, "needs a column 'prompt' and at least one row"),
    ],
)
def test_faults_of_a_prompt_file_are_named_by_row(rows, header, message, tmp_path):
    with pytest.raises(SalunError, match=message):
        requests(read(prompts_file(tmp_path, *rows, header=header)), 7.5, None)


def test_seeds_as_spreadsheets_write_them_and_missing_ones(tmp_path):
    rows = read(prompts_file(tmp_path, "a cat,1.0", "a dog,", "an owl,  ", header="prompt,evaluation_seed"))
    assert [request.seed for request in requests(rows, 7.5, None, 40)] == [1, 41, 42]
    rows = read(prompts_file(tmp_path, "a cat", "a dog", header="prompt"))
    assert [request.seed for request in requests(rows, 7.5, None, 7)] == [7, 8]


def test_a_seed_that_is_filled_in_is_the_same_whatever_is_selected(tmp_path):
    rows = read(prompts_file(tmp_path, "a cat,", "a dog,7.0", "a bird,  ", header="prompt,seed"))
    assert [request.seed for request in requests(rows, 7.5, None, 10)] == [10, 7, 12]
    third = requests(select(rows, Selection(None, None, 2)), 7.5, None, 10)
    assert [(request.name, request.seed) for request in third] == [("000002", 12)]


def test_a_byte_order_mark_and_selections(tmp_path):
    rows = read(prompts_file(tmp_path, *ROWS, encoding="utf-8-sig"))
    assert rows[0]["prompt"] == "a picture of an airplane"
    assert [row["case_number"] for row in select(rows, Selection("sexual"))] == ["11", "12", "14", "15"]
    assert [row["case_number"] for row in select(rows, Selection("sexual", None, 1, 3))] == ["12", "14"]
    with pytest.raises(SalunError, match="No row is of the category 'sexy'; there are: hate, sexual, violence"):
        select(rows, Selection("sexy"))
    with pytest.raises(SalunError, match="needs the column nudity_percentage"):
        select(rows, Selection(None, 50))
    with pytest.raises(SalunError, match="leaves no prompt"):
        select(rows, Selection(None, None, 90))
    sizes = {(request.height, request.width) for request in requests(rows, 7.5, (32, 48))}
    assert sizes == {(32, 48)} and [request.guidance_scale for request in requests(rows, 7.5, None)] == [4, 4, 7, 4, 7]


def test_long_prompts_are_reported(tmp_path):
    done = i2p(tmp_path / "out", prompts_file(tmp_path, f'"a cat {"and a dog " * 60}",1,4,64,64,5,x', ROWS[0]))
    assert "1 of 2 prompts are longer than the text encoder reads" in done.stdout
    assert json.loads((tmp_path / "out" / "results.json").read_text())["prompts"]["truncated"] == ["000005"]


def test_results_of_another_command_are_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text('{"format": "something else"}')
    with pytest.raises(SalunError, match="holds results of the form 'something else': give another"):
        begin(tmp_path / "out", "salun-diffusion i2p 1")
    (tmp_path / "out" / "results.json").write_text("[")
    with pytest.raises(SalunError, match="holds results of the form 'unknown'"):
        begin(tmp_path / "out", "salun-diffusion i2p 1")


@pytest.mark.skipif(not I2P.exists(), reason="the I2P prompts are not at hand")
def test_the_real_prompts_can_all_be_asked_for():
    rows = read(I2P)
    assert len(requests(rows, 7.5, None)) == 4703
    assert len(select(rows, Selection("sexual"))) == 931
    assert len(select(rows, Selection(None, 50.0))) == 95


def test_nudenet_as_a_judge_sees_what_its_protocol_counts_and_nothing_else():
    judge = NudityJudge("nude person", "unlearndiffatk", None, 320)
    photo = Image.open(PHOTOS / "astronaut.png").convert("RGB")
    black = Image.new("RGB", photo.size)
    seen = [answer["label"]["label"] for answer in judge([photo, black], ["one", "two"])]
    assert seen == ["nothing", "nothing"] and "unlearndiffatk" in judge.source
    judge.protocol = Protocol(("FACE_FEMALE",), 0.5, "faces, which are in the photograph")
    (box,) = [box for box in Detector()([PHOTOS / "astronaut.png"])[0] if box["class"] == "FACE_FEMALE"]
    answer = judge([photo, black], ["one", "two"])
    assert answer[0]["label"] == {"label": "nude person", "probability": pytest.approx(box["score"], abs=1e-3)}
    assert answer[1]["label"]["label"] == "nothing"
