"""Data of the user's own and the models that fit it: folders, labels, parquet, CIFAR's own folder, torchvision."""

import os
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PIL
from test_classification_command import classification, scenario

from classification import models
from classification.data import forget_rows, load
from salun_diffusion.errors import SalunError


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Red and blue pictures of two sizes, as parquet files and as folders."""
    where = tmp_path_factory.mktemp("colours")
    for part, count in (("train", 40), ("test", 10)):
        pictures = [PIL.new("RGB", (16 + i % 2, 16), ("red", "blue")[i % 2]) for i in range(count)]
        features = Features({"image": Image(), "label": ClassLabel(names=["red", "blue"])})
        rows = Dataset.from_dict({"image": pictures, "label": [i % 2 for i in range(count)]}, features=features)
        (where / "parquet").mkdir(exist_ok=True)
        rows.to_parquet(where / "parquet" / f"{part}.parquet")
        for i, picture in enumerate(pictures):
            path = where / "folders" / part / ("red", "blue")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    return where


@pytest.mark.parametrize("kind", ["parquet", "folders"])
def test_data_of_the_users_own(colours, kind):
    data = load(str(colours / kind), size=16)
    assert set(data.classes) == {"red", "blue"} and data.train.images.shape == (36, 3, 16, 16)
    assert len(data.validation) == 4 and len(data.test) == 10
    red = data.train.images[data.train.labels == data.classes.index("red")]
    assert len(red) == 18 and (red[:, 0] == 255).all() and (red[:, 2] == 0).all()
    first = load(str(colours / kind)).test.images
    assert first.shape in ((10, 3, 16, 16), (10, 3, 17, 17)), "as wide as the first picture"


def labelled(path, labels, feature=None, count=20):
    pictures = [PIL.new("RGB", (16, 16), (i, 0, 100 * (i % 2))) for i in range(count)]
    rows = Dataset.from_dict({"image": pictures, "label": [labels[i % 2] for i in range(count)]})
    rows.cast_column("image", Image()).to_parquet(path)


@pytest.mark.parametrize("labels", [["dog", "cat"], [2, 1], ["10", "9"], [7.5, -1.0]])
def test_labels_of_any_kind_are_numbered(tmp_path, labels):
    labelled(tmp_path / "all.parquet", labels)
    data = load(str(tmp_path / "all.parquet"))
    by_order = sorted(labels, key=lambda label: int(label) if str(label).isdecimal() else label)
    assert data.classes == tuple(map(str, by_order)) and len(data.test) == 4
    for part in (data.train, data.validation, data.test):
        odd = part.images[:, 0, 0, 0] % 2 == 1
        assert ((part.labels == by_order.index(labels[1])) == odd).all()


def test_a_class_is_asked_for_by_its_name_where_names_are_numbers(tmp_path):
    labelled(tmp_path / "all.parquet", [1, 2])
    data = load(str(tmp_path / "all.parquet"))
    assert (data.train.labels[forget_rows("class:1", data, 0)] == 0).all()
    with pytest.raises(SalunError, match="There is no class '0' in .*; there are: 1, 2"):
        forget_rows("class:0", data, 0)


def test_labels_that_cannot_be(tmp_path):
    labelled(tmp_path / "all.parquet", ["dog", None])
    with pytest.raises(SalunError, match="Picture 1 of the train part of .* has the label None: give each one class"):
        load(str(tmp_path / "all.parquet"))
    (tmp_path / "both").mkdir()
    labelled(tmp_path / "both/train.parquet", ["dog", "cat"])
    labelled(tmp_path / "both/test.parquet", ["dog", "cow"])
    with pytest.raises(SalunError, match="The test part of .* has the class 'cow', which its training part has not"):
        load(str(tmp_path / "both"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(SalunError, match="broken.parquet could not be loaded as a data set"):
        load(str(tmp_path / "broken.parquet"))


def test_pictures_that_cannot_be_read_are_all_named(colours, tmp_path):
    shutil.copytree(colours / "folders", tmp_path / "data")
    whole = (tmp_path / "data/train/red/0.png").read_bytes()
    (tmp_path / "data/train/red/0.png").write_bytes(whole[:45])
    (tmp_path / "data/test/blue/1.png").write_text("no picture")
    (tmp_path / "data/train/red/notes.txt").write_text("taken in May")
    with pytest.raises(SalunError, match=r"cannot be read: .*test/blue/1.png \(.*\), .*train/red/0.png \("):
        load(str(tmp_path / "data"))
    shutil.copytree(colours / "parquet", tmp_path / "rows")
    rows = (
        Dataset.from_parquet(str(tmp_path / "rows/train.parquet")).cast_column("image", Image(decode=False)).to_list()
    )
    rows[7]["image"]["bytes"] = whole[:45]
    features = Features({"image": Image(), "label": ClassLabel(names=["red", "blue"])})
    Dataset.from_list(rows, features).to_parquet(tmp_path / "rows/train.parquet")
    with pytest.raises(SalunError, match="pictures that cannot be read: row 7 of train"):
        load(str(tmp_path / "rows"))


def test_no_picture_of_a_folder_is_passed_over(colours, tmp_path):
    """Whatever its kind, and whatever its class is called."""
    for part in ("train", "test"):
        for name in ("test_tube", "training"):
            for number, kind in enumerate(("png", "gif", "tiff", "webp") * 3):
                path = tmp_path / part / name / f"test_{number}.{kind}"
                path.parent.mkdir(parents=True, exist_ok=True)
                PIL.new("RGB", (8, 8), (number, 0, 0)).save(path)
    data = load(str(tmp_path))
    assert data.classes == ("test_tube", "training") and len(data.train) + len(data.validation) == len(data.test) == 24
    PIL.new("RGB", (8, 8)).save(tmp_path / "train/loose.png")
    with pytest.raises(SalunError, match="has pictures that lie in no class's folder: loose.png"):
        load(str(tmp_path))


def batch(path, count, **more):
    pixels = np.arange(count, dtype=np.uint8)[:, None].repeat(3072, 1)
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(pickle.dumps({"data": pixels, "labels": [i % 2 for i in range(count)]} | more, 2))


def python2_batch(path, count):
    """The very opcodes of the published files: byte strings, and numpy's old names."""
    pixels = np.arange(count, dtype=np.uint8)[:, None].repeat(3072, 1).tobytes()
    shape = b"K" + bytes([count]) + b"M\x00\x0c"
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(" + shape + b"t" + dtype
    array += b"\x89T" + len(pixels).to_bytes(4, "little") + pixels + b"tb"
    labels = b"](" + b"".join(b"K" + bytes([i % 2]) for i in range(count)) + b"e"
    path.write_bytes(b"\x80\x02}(U\x04data" + array + b"U\x06labels" + labels + b"u.")


@pytest.fixture
def cifar(tmp_path):
    """As torchvision lays it out."""
    where = tmp_path / "cifar-10-batches-py"
    for number in range(1, 6):
        batch(where / f"data_batch_{number}", 8)
    python2_batch(where / "test_batch", 6)
    (where / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat", "dog"]}, 2))
    return where


def test_cifar_as_torchvision_keeps_it(cifar, tmp_path):
    for given in (cifar, tmp_path):
        data = load(str(given))
        assert data.classes == ("cat", "dog") and len(data.train) == 36 and len(data.test) == 6
        assert data.train.images.shape[1:] == (3, 32, 32)
        for part in (data.train, data.test):
            assert torch.equal(part.images[:, 2, 31, 31] % 2, part.labels.to(torch.uint8))


class Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_a_pickle_beside_cifar_runs_nothing(cifar, tmp_path):
    batch(cifar / "data_batch_3", 8, extra=Hostile(tmp_path / "ran"))
    with pytest.raises(SalunError, match="data_batch_3 cannot be read as a file of CIFAR .*it names .*system"):
        load(str(cifar))
    assert not (tmp_path / "ran").exists()
    batch(cifar / "data_batch_3", 8, labels=[0])
    with pytest.raises(SalunError, match="data_batch_3 is no batch of CIFAR pictures"):
        load(str(cifar))


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "squeezenet1_1", "googlenet", "torchvision/resnet18"])
def test_any_model_of_torchvision(colours, name):
    data = load(str(colours / "folders"), size=32)
    model = models.build(name, data, 0)
    assert model.train()(torch.rand(4, 3, 32, 32)).shape == (4, 2) and (model.std > 0).all(), "no green is no fault"
    assert model.network.conv1.kernel_size == (7, 7) if name.endswith("resnet18") else True


def test_data_that_cannot_be_learnt_from(colours, tmp_path):
    shutil.copytree(colours / "folders/train/red", tmp_path / "one/red")
    with pytest.raises(SalunError, match="has the one class 'red': give pictures of two or more"):
        load(str(tmp_path / "one"))
    with pytest.raises(SalunError, match="The digits are 8 pixels wide, not 32: leave --image_size out"):
        load("digits", size=32)
    with pytest.raises(SalunError, match="40 pictures of 1000000 pixels do not fit into memory"):
        load(str(colours / "folders"), size=1_000_000)
    with pytest.raises(SalunError, match="cannot be split by class: 5 pictures of 10 classes are too few|of 5 classes"):
        load("digits", limit=5)
    with pytest.raises(SalunError, match="--dataset is empty"):
        load("")


def test_a_forget_set_is_refused_before_anything_is_trained(colours, tmp_path):
    words = ["--dataset", colours / "folders", "--model", "resnet8", "--epochs", "1"]
    for forget, message in (
        ("class:Rde", "There is no class 'Rde' in .*folders; there are: blue, red. Did you mean 'red'?"),
        ("memorised:2", "'memorised:2' names no share between 0 and 1"),
        (f"indices:{tmp_path / 'none.txt'}", "none.txt cannot be read as a list of numbers"),
    ):
        done = classification("run", tmp_path / "out", *words, "--forget", forget, check=False)
        assert done.returncode == 1 and re.search(message, done.stderr) and "Traceback" not in done.stderr
        assert "Training" not in done.stdout and not (tmp_path / "out").exists()
    shutil.copytree(colours / "folders", tmp_path / "data")
    shutil.rmtree(tmp_path / "data/test/red")
    with pytest.raises(SalunError, match="--forget class:red leaves no test picture to measure with"):
        scenario(tmp_path / "out", dataset=str(tmp_path / "data"), forget="class:red", limit=None).begin()


def test_models_of_torchvision_that_do_not_fit(colours, tmp_path):
    data = load(str(colours / "folders"), size=32)
    with pytest.raises(SalunError, match="alexnet takes no pictures of 32 pixels .*: give another --image_size"):
        models.build("alexnet", data, 0)
    ends = {"dataset": str(colours / "folders"), "image_size": 32, "limit": None, "model": "squeezenet1_1"}
    with pytest.raises(
        SalunError, match="BE and the methods that change the head's biases need a linear layer of classes"
    ):
        scenario(tmp_path / "out", methods=["be"], **ends).begin()
    assert not (tmp_path / "out").exists()
