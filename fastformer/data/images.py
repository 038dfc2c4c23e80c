"""Small images as whole numbers: scikit-learn's digits, Fashion-MNIST, a folder of pictures or an .npz file.

A pixel is one of ``levels`` numbers 0 … levels - 1, evenly spaced from black to white, so that models give it a
probability and their bits per dimension are those of a lossless code (Theis et al. 2016, arXiv:1511.01844, §3.1).
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..extras import require
from .batches import Batch
from .packages import debian_package

FASHION = "usr/share/datasets/fashion-mnist"
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif")


@dataclass(frozen=True)
class Images:
    """Images of one size: a dataset of ``(pixels, label)``.

    Attributes:
        pixels: ``(N, C, H, W)`` uint8, in [0, levels).
        labels: ``(N)`` int64, -1 where there is none.
        levels: number of values a pixel can have.
    """

    pixels: Tensor
    labels: Tensor
    levels: int

    def __post_init__(self) -> None:
        if self.pixels.dim() != 4 or self.pixels.dtype != torch.uint8 or not self.pixels.numel():
            raise ValueError(
                f"pixels: expected uint8 (N, C, H, W), got {self.pixels.dtype} of shape {tuple(self.pixels.shape)}"
            )
        if not 2 <= self.levels <= 256 or int(self.pixels.max()) >= self.levels:
            raise ValueError(f"levels: got {self.levels}, expected 2 to 256 and more than the brightest pixel")
        if self.labels.shape != (len(self.pixels),):
            raise ValueError(f"labels: shape {tuple(self.labels.shape)} is not ({len(self.pixels)},)")

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.pixels[index], self.labels[index]

    @property
    def num_labels(self) -> int:
        """Number of classes; 0 without labels."""
        return int(self.labels.max()) + 1

    def part(self, indices: Any) -> Images:
        """The images at ``indices``, a slice or a tensor."""
        return replace(self, pixels=self.pixels[indices], labels=self.labels[indices])


@dataclass(frozen=True)
class ImageParts:
    """A data set to train on, to choose by, and to report on."""

    name: str
    train: Images
    validation: Images
    test: Images


def load_images(source: str = "digits", *, size: int = 0, levels: int = 0) -> ImageParts:
    """The images named by ``source``.

    Args:
        source: ``"digits"`` (1,797 of 8 × 8, 17 levels, in scikit-learn), ``"fashion-mnist"`` (70,000 of 28 × 28, 256
            levels, from Debian's dataset-fashion-mnist), a folder of pictures (its subfolders, if any, are the
            classes), or an .npz file with ``images`` (N, H, W) or (N, H, W, C) uint8 and, optionally, ``labels`` (N).
        size: side of the images, by averaging squares of pixels; it divides the side they have. 0: as they are.
        levels: values of a pixel; 0: as they are.

    Raises:
        FileNotFoundError: nothing is at ``source``, or a package is not to be had.
        ValueError: a size or number of levels that does not fit.
    """
    if source == "digits":
        datasets = require("sklearn.datasets", "the digits", "eval")
        bunch = datasets.load_digits()
        parts = _held_out(
            Images(torch.tensor(bunch.images, dtype=torch.uint8)[:, None], torch.tensor(bunch.target), 17)
        )
    elif source == "fashion-mnist":
        train, test = (_fashion(part) for part in ("train", "t10k"))
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        held_out = len(train) // 12
        parts = train.part(order[held_out:]), train.part(order[:held_out]), test
    else:
        path = Path(source).expanduser()
        if not path.exists():
            raise FileNotFoundError(
                f"data.path: {source!r} does not exist; expected 'digits', 'fashion-mnist', a folder or an .npz file"
            )
        parts = _held_out(_folder(path) if path.is_dir() else _npz(path))
    return ImageParts(source, *(_reduced(part, size, levels) for part in parts))


def collate_images(samples: Sequence[tuple[Tensor, Tensor]], keys: Any = None) -> Batch:
    """``pixel_values (B, C, H, W)`` uint8 and ``labels (B)``."""
    pixels, labels = zip(*samples)
    return {"pixel_values": torch.stack(pixels), "labels": torch.stack(labels)}


def _held_out(images: Images) -> tuple[Images, Images, Images]:
    """A tenth for validation and a sixth for the test, the same ones every time."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    validation, test = max(1, len(images) // 10), max(1, len(images) // 6)
    if len(images) < 3:
        raise ValueError(f"data.path: {len(images)} images are too few for training, validation and test")
    chosen = order[validation + test :], order[:validation], order[validation : validation + test]
    train, held, tested = (images.part(indices) for indices in chosen)
    return train, held, tested


def _reduced(images: Images, size: int, levels: int) -> Images:
    pixels, height = images.pixels, images.pixels.shape[-1]
    if size and size != height:
        if size < 1 or height % size or pixels.shape[-2] != height:
            raise ValueError(f"data.size: got {size}, expected a divisor of the images' side, {height}, and squares")
        pixels = F.avg_pool2d(pixels.float(), height // size).round().to(torch.uint8)
    if levels and levels != images.levels:
        if not 2 <= levels < images.levels:
            raise ValueError(f"data.levels: got {levels}, expected 2 to the {images.levels} that the images have")
        pixels = (pixels.long() * levels // images.levels).to(torch.uint8)
    return Images(pixels, images.labels, levels or images.levels)


def _fashion(part: str) -> Images:
    folder = debian_package("dataset-fashion-mnist", FASHION)
    pixels, labels = (_idx(folder / f"{part}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    return Images(torch.from_numpy(pixels)[:, None], torch.from_numpy(labels).long(), 256)


def _idx(file: Path) -> np.ndarray:
    """A gzipped IDX file of bytes: two zeros, 8 for uint8, the number of dimensions, each dimension, the values."""
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}")
    data = gzip.decompress(file.read_bytes())
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"{file}: not an IDX file of bytes")
    shape = np.frombuffer(data, ">u4", data[3], 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape).copy()


def _npz(path: Path) -> Images:
    with np.load(path) as arrays:
        if "images" not in arrays:
            raise ValueError(f"data.path: {path} has {', '.join(arrays)}; expected images and, optionally, labels")
        pixels = arrays["images"]
        labels = arrays["labels"] if "labels" in arrays else np.full(len(pixels), -1)
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4):
        raise ValueError(
            f"data.path: images of {path} are {pixels.dtype} {pixels.shape}; expected uint8 (N, H, W[, C])"
        )
    return Images(_channels_first(pixels), torch.from_numpy(labels.astype(np.int64)), 256)


def _folder(path: Path) -> Images:
    pictures = require("PIL.Image", "reading pictures", "train")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES)
    if not files:
        raise ValueError(f"data.path: {path} holds no pictures (looked for {', '.join(PICTURES)})")
    classes = sorted({file.parent for file in files})
    arrays = []
    for file in files:
        with pictures.open(file) as picture:
            arrays.append(np.asarray(picture if picture.mode == "L" else picture.convert("RGB")))
        if arrays[-1].shape != arrays[0].shape:
            raise ValueError(
                f"data.path: {file} is {arrays[-1].shape}, {files[0]} is {arrays[0].shape}; one size, please"
            )
    labels = [classes.index(file.parent) if len(classes) > 1 else -1 for file in files]
    return Images(_channels_first(np.stack(arrays)), torch.tensor(labels), 256)


def _channels_first(pixels: np.ndarray) -> Tensor:
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(pixels))
