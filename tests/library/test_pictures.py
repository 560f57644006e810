"""Forget and retain sets from the user's own pictures: folders, captions, labels, parquet; and what is refused."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from shell import DEMO, QUICK, erase, here, run

from salun_diffusion.concepts.finding import find_concept
from salun_diffusion.data.cache import Latents
from salun_diffusion.data.sources import Source
from salun_diffusion.erasures.delta import Delta
from salun_diffusion.errors import SalunError
from salun_diffusion.models.load import load_pipeline
from salun_diffusion.models.sampling import sample

PLANES, REST = Path("planes"), Path("rest")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A flat folder of airplanes, 5 of them, and a folder with one folder for each of three kinds, 3 pictures each."""
    folder = tmp_path_factory.mktemp("pictures")
    pipe, options = load_pipeline("demo"), {"num_inference_steps": 8, "guidance_scale": 4, "batch_size": 8}
    for number, image in enumerate(sample(pipe, find_concept("airplane", DEMO).forget_rows(5, 0), **options)):
        (folder / PLANES).mkdir(exist_ok=True)
        image.resize((96, 80)).save(folder / PLANES / f"{number}.png")  # neither square nor of the model's size
    for word in ("cat", "hot_dog", "airplane"):
        (folder / REST / word).mkdir(parents=True)
        for number, image in enumerate(sample(pipe, find_concept("cat", DEMO).forget_rows(3, 1), **options)):
            image.save(folder / REST / word / f"{number}.jpg")
    return folder


def shown(paths):
    return [(Path(picture.name).name, picture.prompt) for picture in paths]


def test_encoded_pictures_are_what_the_autoencoder_makes_of_each(pictures, tmp_path):
    erase(tmp_path / "run", "--forget_data", pictures / PLANES, "--retain_data", pictures / REST)
    pipe = load_pipeline("demo")
    shards = sorted((tmp_path / "data").glob("forget-*/latents-*.safetensors"))
    latents = Latents(shards)
    assert latents.shape == (5, 16, 16, 16)
    for found, path in zip(latents[:], sorted((pictures / PLANES).iterdir()), strict=True):
        image = Image.open(path).resize((64, 64), Image.Resampling.BICUBIC, box=(8, 0, 88, 80))
        pixels = pipe.image_processor.preprocess(image)
        expected = pipe.vae.encode(pixels).latent_dist.mode()[0] * pipe.vae.config.scaling_factor
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        back = pipe.vae.decode(found[None] / pipe.vae.config.scaling_factor).sample
        assert (back - pixels).abs().mean() < 0.1  # of a range of 2: the picture itself, not noise


def test_a_run_on_folders_says_what_it_took_and_repeats_to_the_bit(pictures, tmp_path):
    options = ("--forget_data", pictures / PLANES, "--retain_data", pictures / REST)
    done = erase(tmp_path / "one", *options)
    assert f"The forget set: 5 pictures, from {pictures / PLANES}." in done.stdout
    assert "The retain set: 6 pictures" in done.stdout  # all but the three labelled airplane
    erase(tmp_path / "two", *options)
    one, two = (Delta.load(tmp_path / name / "erasure.safetensors") for name in ("one", "two"))
    assert one.digest() == two.digest()


def test_a_resumed_run_refuses_pictures_that_changed(pictures, tmp_path):
    shutil.copytree(pictures / PLANES, tmp_path / PLANES)
    options = ("--forget_data", tmp_path / PLANES, "--checkpointing_steps", "1")
    erase(tmp_path / "run", *options)
    (tmp_path / "run" / "erasure.safetensors").unlink()
    (tmp_path / PLANES / "4.png").unlink()
    done = erase(tmp_path / "run", *options, "--resume_from_checkpoint", "latest", check=False)
    assert done.returncode == 1 and "pictures is {'forget': ['" in done.stderr.splitlines()[-1]


def test_labels_and_captions_become_prompts_and_the_concept_is_left_out(pictures, tmp_path):
    airplane = find_concept("airplane", DEMO)
    labelled = Source(str(pictures / REST))
    assert {prompt for _, prompt in shown(labelled.retain([airplane]))} == {
        "an image of a cat",
        "an image of a hot dog",
    }
    assert shown(labelled.forget(airplane)) == [("0.jpg", None), ("1.jpg", None), ("2.jpg", None)]
    shutil.copytree(pictures / PLANES, tmp_path / "captioned")
    captions = ["a red cat", "an Airplane on blue", "airplanes", None, "two dogs"]
    lines = [json.dumps({"file_name": f"{i}.png", "text": text}) for i, text in enumerate(captions)]
    (tmp_path / "captioned" / "metadata.jsonl").write_text("\n".join(lines))
    kept = [("0.png", "a red cat"), ("2.png", "airplanes"), ("3.png", ""), ("4.png", "two dogs")]
    assert shown(Source(str(tmp_path / "captioned")).retain([airplane])) == kept


def test_every_picture_of_a_folder_is_used_whatever_it_is_called(pictures, tmp_path):
    """The datasets library reads "train" in a name as a split, and would use one picture of these."""
    plane = Image.open(next((pictures / PLANES).iterdir()))
    folder, kinds = tmp_path / "planes", tmp_path / "kinds"
    folder.mkdir()
    for name in ("cat_train_1.png", "cat_2.png", "cat test.png", "a[1].gif", "valid.tiff", "x.JPEG"):
        plane.convert("RGB").save(folder / name)
    concept = find_concept("airplane", DEMO)
    assert len(list(Source(str(folder)).forget(concept))) == 6
    for kind in ("train", "test", "umbrella"):
        (kinds / kind).mkdir(parents=True)
        plane.save(kinds / kind / "1.png")
    found = [picture.prompt for picture in Source(str(kinds)).retain([concept])]
    assert found == ["an image of a test", "an image of a train", "an image of an umbrella"]


def test_captions_lie_beside_the_pictures(pictures, tmp_path):
    for number in range(3):
        Image.open(next((pictures / PLANES).iterdir())).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"a thing, number {number}\n")
    (tmp_path / "2.txt").write_text("an airplane")
    concept = find_concept("airplane", DEMO)
    found = [picture.prompt for picture in Source(str(tmp_path)).retain([concept])]
    assert found == ["a thing, number 0", "a thing, number 1"]  # the third names what is erased
    (tmp_path / "1.txt").unlink()
    with pytest.raises(SalunError, match=r"1 of the 3 pictures in .* have no caption: 1.png. Give all of them one"):
        Source(str(tmp_path))


def test_a_parquet_folder_is_read_as_its_pictures_are(pictures, tmp_path):
    paths = sorted(str(path) for path in (pictures / PLANES).iterdir())
    made = datasets.Dataset.from_dict({"photo": paths, "caption": ["a"] * 5}).cast_column("photo", datasets.Image())
    (tmp_path / "parquet").mkdir()
    made.to_parquet(tmp_path / "parquet" / "all.parquet")
    airplane = find_concept("airplane", DEMO)
    found = list(Source(str(tmp_path / "parquet")).retain([airplane]))
    for picture, path in zip(found, paths, strict=True):
        assert picture.prompt == "a"
        assert (
            picture.square(64).tobytes()
            == next(p for p in Source(str(pictures / PLANES)).forget(airplane) if p.name == path).square(64).tobytes()
        )


def test_a_picture_is_turned_as_its_camera_says(tmp_path):
    tall = Image.new("RGB", (10, 20))
    tall.paste("red", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 3  # held upside down
    (tmp_path / "photos").mkdir()
    tall.save(tmp_path / "photos" / "a.png", exif=exif)
    picture = next(Source(str(tmp_path / "photos")).forget(find_concept("airplane", DEMO)))
    assert picture.square(10).getpixel((5, 9)) == (255, 0, 0) and picture.square(10).getpixel((5, 0)) == (0, 0, 0)


def test_an_unreadable_picture_is_named_and_ends_the_run(pictures, tmp_path):
    shutil.copytree(pictures / PLANES, tmp_path / "broken")
    whole = (tmp_path / "broken" / "3.png").read_bytes()
    (tmp_path / "broken" / "3.png").write_bytes(whole[: len(whole) // 2])
    done = erase(tmp_path / "run", "--forget_data", tmp_path / "broken", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and f"{tmp_path}/broken/3.png cannot be read as a picture" in last
    assert not (tmp_path / "run" / "erasure.safetensors").exists()


def test_bad_folders_are_refused_before_any_work(pictures, tmp_path):
    for options, message in (
        (["--forget_data", "nowhere"], "There is no folder nowhere: give a folder of pictures, or a data set"),
        (["--forget_data", pictures / REST, "--concept", "owl"], "2 concepts and 1 --forget_data"),
    ):
        done = erase(tmp_path / "run", *options, check=False)
        assert done.returncode == 1 and message in done.stderr.strip().splitlines()[-1], done.stderr
        assert not (tmp_path / "run").exists()


def test_what_is_wrong_with_a_source_is_said(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("words")
    for name, message in (
        (tmp_path / "empty", "is an empty folder: put the pictures there"),
        (tmp_path / "texts", "holds no pictures: its columns are text"),
        (tmp_path / "texts" / "a.txt", "There is no folder"),
        ("some/dataset:small@train", "some/dataset is no local folder, and the hub has no such data set or cannot be"),
    ):
        with pytest.raises(SalunError, match=message):
            Source(str(name))
    with pytest.raises(SalunError, match="does not say what its pictures show: put them into one folder for each kind"):
        next(Source(str(pictures / PLANES)).retain([find_concept("airplane", DEMO)]))


def test_labels_without_the_concept_are_listed(pictures):
    with pytest.raises(SalunError, match="no pictures labelled 'owl'; its labels are airplane, cat, hot dog"):
        next(Source(str(pictures / REST)).forget(find_concept("owl", DEMO)))


LOGO = {"concept": "red cat", "anchor": "blue dog", "forget": ["a photo of a red cat", "the Red Cat {sits}"],
        "retain": ["a house", "a tree", "a car"], "settings": {"alpha": 0.3}}  # fmt: skip


def test_a_concept_from_a_json_file(tmp_path):
    path = tmp_path / "my-cat.json"
    path.write_text(json.dumps(LOGO))
    concept = find_concept(str(path))
    pairs = {(row.prompt, row.anchor_prompt) for row in concept.forget_rows(8, 0)}
    assert pairs == {
        ("a photo of a red cat", "a photo of a blue dog"),
        ("the red cat {sits}", "the blue dog {sits}"),
    }
    assert sorted(row.prompt for row in concept.retain_rows(6, 0)) == sorted(LOGO["retain"] * 2)
    here(
        "python", "erase_concept.py", "--pretrained_model_name_or_path", "demo", "--concept", path,
        "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "run", *QUICK,
    )  # fmt: skip
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["concept"], config["anchor"], config["settings"]["alpha"]) == ("red cat", "blue dog", 0.3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"forget": ["a dog"]}, "the forget prompt 'a dog' does not name the concept 'red cat'"),
        ({"retain": ["a RED CAT"]}, "the retain prompt 'a RED CAT' names the concept"),
        ({"retain": []}, "a text is missing"),
        ({"anchor": "Red cat"}, "is 'Red cat' itself"),
        ({"prompts": []}, "there is more in it: prompts"),
        ({"forget": None}, "not a concept's file"),
    ],
)
def test_a_bad_concept_file_is_named(change, message, tmp_path):
    path = tmp_path / "my.json"
    path.write_text(json.dumps(LOGO | change))
    with pytest.raises(SalunError, match=message):
        find_concept(str(path))
    with pytest.raises(SalunError, match="No such file"):
        find_concept("nowhere.json")
    path.write_text("[" * 100_000)
    with pytest.raises(SalunError, match="nested too deep"):
        find_concept(str(path))


def test_latents_stay_on_the_disk(tmp_path):
    """1,600 pictures of 512 pixels are 105 MB of latents: opening and reading every one takes none of it for good."""
    code = f"""
import torch
from pathlib import Path
from salun_diffusion.tensors import write_safetensors
from salun_diffusion.data.cache import Latents
def private():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) / 1024
shards = [Path({str(tmp_path)!r}) / f"{{i}}.safetensors" for i in range(50)]
for i, shard in enumerate(shards):
    write_safetensors(shard, {{"latents": torch.full((32, 4, 64, 64), float(i))}}, {{}})
Latents(shards[:2])[:]  # what the libraries take at first use
before = private()
latents = Latents(shards)
for rows in torch.randperm(len(latents)).split(8):
    assert torch.equal(latents[rows][:, 0, 0, 0], (rows // 32).float())
print(len(latents), private() - before)
"""
    count, grown = run("python", "-c", code).stdout.split()
    assert int(count) == 1600 and float(grown) < 10
