"""Data sets by name, as images in memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import TensorDataset
from torchvision.datasets import CIFAR10, MNIST
from torchvision.datasets.utils import check_integrity

from .errors import UsageError


@dataclass(frozen=True)
class Images:
    """Float images (N, C, H, W) in [0, 1] with int64 labels (N), split for training and testing."""

    train: TensorDataset
    test: TensorDataset
    classes: list[str]

    def limited(self, limit: int) -> "Images":
        def head(split: TensorDataset) -> TensorDataset:
            return TensorDataset(*(tensor[:limit] for tensor in split.tensors))

        return Images(head(self.train), head(self.test), self.classes)


def digits(size: int, channels: int, root: Path, download: bool) -> Images:
    """scikit-learn's 1,797 handwritten 8x8 digits, which are part of it; a fixed 80/20 split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    images = resized(images, size, channels)
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    # The split never depends on --seed: every run is tested on the same images.
    train, test = train_test_split(
        range(len(labels)), test_size=0.2, stratify=bunch.target, random_state=0
    )
    return Images(
        TensorDataset(images[train], labels[train]),
        TensorDataset(images[test], labels[test]),
        [str(name) for name in bunch.target_names],
    )


def mnist(size: int, channels: int, root: Path, download: bool) -> Images:
    """60,000 and 10,000 handwritten digits of 28x28 pixels, from <root>/MNIST/raw."""
    names = [Path(name).stem for name, _ in MNIST.resources]
    files = [(root / "MNIST" / "raw" / name, None) for name in names]
    return _torchvision(MNIST, files, size, channels, root, download)


def cifar10(size: int, channels: int, root: Path, download: bool) -> Images:
    """50,000 and 10,000 photographs of 32x32 pixels, from <root>/cifar-10-batches-py."""
    meta = (CIFAR10.meta["filename"], CIFAR10.meta["md5"])
    listed = [*CIFAR10.train_list, *CIFAR10.test_list, meta]
    files = [(root / CIFAR10.base_folder / name, md5) for name, md5 in listed]
    return _torchvision(CIFAR10, files, size, channels, root, download)


DATASETS: dict[str, Callable[..., Images]] = {"digits": digits, "mnist": mnist, "cifar10": cifar10}


def load(
    name: str,
    size: int = 28,
    channels: int = 1,
    root: Path = Path("data"),
    download: bool = False,
    **unknown: Any,
) -> Images:
    """The data set called ``name``, its images resized to (channels, size, size)."""
    if name not in DATASETS:
        raise UsageError(f"no data set {name!r}; known: {', '.join(DATASETS)}")
    if unknown:
        raise UsageError(f"[data] takes name, size and channels, not {', '.join(unknown)}")
    if not isinstance(size, int) or size < 1:
        raise UsageError(f"[data] {name}: size must be a whole number of at least 1, got {size!r}")
    if channels not in (1, 3):
        raise UsageError(f"[data] {name}: channels must be 1 or 3, got {channels!r}")
    return DATASETS[name](size, channels, root, download)


def resized(images: Tensor, size: int, channels: int) -> Tensor:
    """Images (N, 1 or 3, H, W) as (N, channels, size, size); colour is averaged, grey repeated."""
    if images.shape[-2:] != (size, size):
        images = interpolate(images, (size, size), mode="bilinear")
    if images.shape[1] != channels:
        images = images.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    return images.contiguous()


def _torchvision(
    dataset: Any,
    files: Sequence[tuple[Path, str | None]],
    size: int,
    channels: int,
    root: Path,
    download: bool,
) -> Images:
    """Both splits of a torchvision data set, whose loading needs ``files`` with those MD5 sums.

    CIFAR-10's files are pickles. torchvision opens them only if their MD5 sums are right, which is
    what keeps a crafted one from running code.
    """
    if download:
        _download(dataset, root)
    fix = f"--download fetches {dataset.__name__}, --root says where it is"
    for path, md5 in files:
        if not path.is_file():
            raise UsageError(f"{path} is missing: {fix}")
        if not check_integrity(path, md5):
            raise UsageError(f"{path} is damaged (its MD5 sum is not {md5}): delete it; {fix}")
    try:
        splits = [dataset(root, train=train) for train in (True, False)]
        train, test = (_tensors(split, size, channels) for split in splits)
    except Exception as error:  # torchvision raises half a dozen types for a damaged file
        reason = str(error).partition("\n")[0] or type(error).__name__
        where = files[0][0].parent
        raise UsageError(f"the files in {where} are damaged ({reason}): delete it; {fix}") from None
    return Images(train, test, [str(name) for name in splits[0].classes])


def _download(dataset: Any, root: Path) -> None:
    """Fetch what is missing or damaged; with everything there, this needs no network."""
    try:
        dataset(root, download=True)
    except Exception as error:
        reason = str(error).replace("\n", " ")
        raise UsageError(
            f"{dataset.__name__} cannot be downloaded to {root} ({reason}): on a machine without "
            "network, copy that folder from one with it"
        ) from None


def _tensors(split: Any, size: int, channels: int) -> TensorDataset:
    pixels = torch.as_tensor(split.data)
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    labels = torch.as_tensor(split.targets, dtype=torch.int64)
    if len(labels) != len(pixels) or not len(labels):
        raise ValueError(f"{len(pixels)} images and {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= len(split.classes):
        raise ValueError(f"a label outside 0...{len(split.classes) - 1}")
    return TensorDataset(resized(pixels.float() / 255, size, channels), labels)
