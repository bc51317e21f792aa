"""The examples' data: tiny MNIST and CIFAR-10 files in their real formats, and what is drawn."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import example_runs
import numpy as np
import pytest
import torch
from dlops_examples import batches, builders, data, recipes
from dlops_examples.errors import UsageError
from torch.utils.data import TensorDataset
from torchvision.datasets import CIFAR10, MNIST

pytestmark = pytest.mark.example

NAMES = [f"class {i}" for i in range(10)]


def idx(array: np.ndarray) -> bytes:
    """The format of MNIST's files: unsigned bytes after their shape."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for split, count in (("train", 40), ("t10k", 20)):
        pixels = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(idx(pixels))
        labels = np.arange(count, dtype=np.uint8) % 10
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six batches and batches.meta, whose MD5 sums take the place of the real ones."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)

    def write(name: str, content: dict[str, Any]) -> tuple[str, str]:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return name, hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(name: str) -> tuple[str, str]:
        pixels = random.integers(0, 256, (10, 3072), dtype=np.uint8)
        names = [f"{i}.png" for i in range(10)]
        return write(name, {"data": pixels, "labels": list(range(10)), "filenames": names})

    monkeypatch.setattr(CIFAR10, "train_list", [batch(f"data_batch_{i}") for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch")])
    name, md5 = write("batches.meta", {"label_names": NAMES})
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"filename": name, "md5": md5})
    return tmp_path


def test_mnist_files(mnist: Path) -> None:
    images = data.load("mnist", root=mnist)
    pixels, labels = images.train.tensors
    first = (mnist / "MNIST" / "raw" / "train-images-idx3-ubyte").read_bytes()[16 : 16 + 784]
    assert pixels.shape == (40, 1, 28, 28)
    assert (pixels[0].flatten() * 255).round().to(torch.uint8).numpy().tobytes() == first
    assert labels.tolist() == [i % 10 for i in range(40)]
    assert images.test.tensors[0].shape == (20, 1, 28, 28)
    assert data.load("mnist", size=32, channels=3, root=mnist).train.tensors[0].shape[1:] == (
        3,
        32,
        32,
    )


def test_cifar10_files(cifar10: Path) -> None:
    images = data.load("cifar10", size=32, channels=3, root=cifar10)
    pixels, labels = images.train.tensors
    batch = pickle.loads((cifar10 / "cifar-10-batches-py" / "data_batch_2").read_bytes())
    assert images.classes == NAMES
    assert pixels.shape == (50, 3, 32, 32)
    torch.testing.assert_close(
        pixels[10:20].reshape(10, 3072), torch.tensor(batch["data"]).float() / 255
    )
    assert labels.tolist() == list(range(10)) * 5
    grey = data.load("cifar10", size=28, channels=1, root=cifar10).test.tensors[0]
    assert grey.shape == (10, 1, 28, 28)


@pytest.mark.parametrize("recipe", ["digits_cnn", "mnist_cnn"])
def test_training_on_mnist(mnist: Path, recipe: str) -> None:
    options = ("--data", "mnist", "--root", str(mnist), "--epochs", "1")
    metrics = example_runs.metrics(example_runs.train(mnist, "--recipe", recipe, *options))
    assert metrics["identity"]["recipe"]["data"] == {"name": "mnist", "size": 28, "channels": 1}
    assert sum(map(sum, metrics["confusion"])) == 20


CIFAR10_RECIPES = ["scratch", "vanilla", "lenet_alexnet", "deep_bn", "two_block", "adam_cnn"]


@pytest.mark.parametrize("recipe", [*CIFAR10_RECIPES, "resnet32"])
def test_training_on_cifar10(cifar10: Path, recipe: str) -> None:
    """With the published schedule and augmentation, which a recipe keeps for real data."""
    options = ("--data", "cifar10", "--root", str(cifar10), "--epochs", "1")
    metrics = example_runs.metrics(example_runs.train(cifar10, "--recipe", recipe, *options))
    trained, expected = (
        metrics["identity"]["recipe"],
        recipes.load(recipe, {"data.name": "cifar10"}),
    )
    for key in ("batch_size", "network", "optimizer", "schedule", "augment"):
        assert trained[key] == getattr(expected, key)
    assert sum(map(sum, metrics["confusion"])) == 10


def test_mnist_files_that_are_wrong(mnist: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, command = mnist / "MNIST" / "raw", ("--data", "mnist", "--root", str(mnist))
    labels, images = raw / "train-labels-idx1-ubyte", raw / "train-images-idx3-ubyte"
    good = labels.read_bytes()
    labels.write_bytes(good[:-1])
    line = example_runs.refusal(capsys, *command)
    assert f"the files in {raw} are damaged" in line
    assert "delete it; --download fetches MNIST, --root says where it is" in line
    for wrong, reason in [(b"", ""), (idx(np.full(40, 10, np.uint8)), "a label outside 0...9")]:
        labels.write_bytes(wrong)
        assert f"damaged ({reason}" in example_runs.refusal(capsys, *command)
    labels.write_bytes(gzip.compress(good))
    assert "are damaged" in example_runs.refusal(capsys, *command)
    labels.write_bytes(idx(np.zeros(39, np.uint8)))
    assert "40 images and 39 labels" in example_runs.refusal(capsys, *command)
    images.unlink()
    line = example_runs.refusal(capsys, *command)
    assert f"{images} is missing: --download fetches MNIST" in line


def test_cifar10_files_that_are_wrong(cifar10: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("--recipe", "vanilla", "--data", "cifar10", "--root", str(cifar10))
    batch = cifar10 / "cifar-10-batches-py" / "data_batch_3"
    good = batch.read_bytes()
    batch.write_bytes(good[:-100])
    line = example_runs.refusal(capsys, *command)
    assert f"{batch} is damaged (its MD5 sum is not " in line
    assert "delete it; --download fetches CIFAR10" in line
    batch.unlink()
    assert f"{batch} is missing: --download" in example_runs.refusal(capsys, *command)
    shutil.rmtree(batch.parent)
    assert "data_batch_1 is missing" in example_runs.refusal(capsys, *command)


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "batches.meta"])
def test_crafted_pickle_is_not_opened(cifar10: Path, name: str) -> None:
    trace = cifar10 / "trace"
    (cifar10 / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(Payload(trace)))
    with pytest.raises(UsageError, match=f"{name} is damaged"):
        data.load("cifar10", size=32, channels=3, root=cifar10)
    assert not trace.exists()


def test_download(
    mnist: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is fetched unasked, nor when all is there; a failure says what to do."""

    def offline(self: MNIST) -> None:
        raise RuntimeError("Error downloading train-images:\n<urlopen error no route>")

    there = ("--data", "mnist", "--root", str(mnist), "--epochs", "1", "--out", str(mnist))
    assert example_runs.main([*there, "--download", "--limit", "32", "--threads", "1"]) == 0
    monkeypatch.setattr(MNIST, "download", offline)
    elsewhere = ("--data", "mnist", "--root", str(mnist / "empty"))
    assert "is missing: --download" in example_runs.refusal(capsys, *elsewhere)
    line = example_runs.refusal(capsys, *elsewhere, "--download")
    assert "MNIST cannot be downloaded to " in line
    assert "no route>): on a machine without network" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "imagenet"}, "no data set 'imagenet'; known: digits, mnist, cifar10"),
        ({"name": "digits", "channels": 2}, "channels must be 1 or 3, got 2"),
        ({"name": "digits", "size": 2.5}, "size must be a whole number of at least 1, got 2.5"),
        ({"name": "digits", "folds": 3}, "takes name, size and channels, not folds"),
    ],
)
def test_bad_data_tables(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        data.load(**arguments)


AUGMENT = [
    {"name": "RandomCrop", "size": 8, "padding": 2},
    {"name": "RandomHorizontalFlip"},
    {"name": "GaussianNoise", "sigma": 0.5, "clip": False},
]
SPLIT = TensorDataset(torch.arange(20 * 64.0).reshape(20, 1, 8, 8) / 1280, torch.arange(20))


def epoch(
    seed: int, batch_size: int, rank: int = 0, processes: int = 1, workers: int = 0
) -> list[batches.Part]:
    dataset = batches.Augmented(SPLIT, builders.transforms(AUGMENT, "augment"), None, seed)
    order = batches.order(len(SPLIT), batch_size, seed)
    return list(batches.parts(dataset, order, rank, processes, workers))


def by_label(parts: list[batches.Part]) -> torch.Tensor:
    labels = torch.cat([part.labels[: part.own] for part in parts])
    assert sorted(labels.tolist()) == list(range(20))
    return torch.cat([part.images[: part.own] for part in parts])[labels.argsort()]


def test_augmentation_depends_on_seed_and_image_alone() -> None:
    torch.manual_seed(0)
    images = by_label(epoch(seed=1, batch_size=20))
    drawn_afterwards = torch.rand(1)
    assert torch.equal(images, by_label(epoch(seed=1, batch_size=3)))
    assert torch.equal(images, by_label(epoch(seed=1, batch_size=7, workers=2)))
    shared = [part for rank in range(3) for part in epoch(1, 7, rank, processes=3)]
    assert torch.equal(images, by_label(shared))
    assert not torch.equal(images, by_label(epoch(seed=2, batch_size=20)))
    noise = (images - SPLIT.tensors[0]).flatten(1).std(1)
    assert noise.unique().numel() == 20  # each image has draws of its own
    torch.manual_seed(0)
    torch.empty((), dtype=torch.int64).random_()  # DataLoader's own draw
    assert torch.equal(drawn_afterwards, torch.rand(1))


def test_parts_of_a_batch() -> None:
    """They differ by at most one image; an empty one holds an image that does not count."""
    sizes = [[part.own for part in epoch(0, 8, rank, processes=5)] for rank in range(5)]
    assert sizes == [[2, 2, 1], [2, 2, 1], [2, 2, 1], [1, 1, 1], [1, 1, 0]]
    last = epoch(0, 8, rank=4, processes=5)[-1]
    assert (len(last.images), last.own, last.size) == (1, 0, 4)


def test_normalisation_is_for_test_images_too() -> None:
    step = {"name": "Normalize", "mean": [0.5], "std": [0.25]}
    dataset = batches.Augmented(SPLIT, None, builders.transforms([step], "normalize"), 0)
    (part,) = batches.parts(dataset, batches.order(20, 20, None))
    torch.testing.assert_close(part.images, (SPLIT.tensors[0] - 0.5) / 0.25)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"name": "RandomCropp"}, "has no class 'RandomCropp'"),
        ({"name": "functional"}, "has no class 'functional'"),
        ({}, "has no class 'None'"),
        ({"name": "RandomHorizontalFlip", "p": 2}, "RandomHorizontalFlip: "),
        ({"name": "RandomCrop", "area": 2}, "RandomCrop: .*area"),
    ],
)
def test_bad_transforms(step: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        builders.transforms([step], "augment")
