"""Images from packages, folders and arrays: whole numbers, the same split every time; misfits are named."""

import gzip

import numpy as np
import pytest
import torch

from fastformer.data import images
from fastformer.data.images import Images, collate_images, load_images


def saved(path, count=12, side=4, **more):
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side), dtype=np.uint8)
    np.savez(path, images=pixels, **more)
    return pixels


def test_digits():
    pytest.importorskip("sklearn", reason="the digits are in scikit-learn")
    parts = load_images("digits")
    assert [len(part) for part in (parts.train, parts.validation, parts.test)] == [1319, 179, 299]
    assert parts.train.pixels.shape[1:] == (1, 8, 8) and parts.train.levels == 17 and parts.train.num_labels == 10
    assert parts.test.labels.unique().tolist() == list(range(10))
    assert torch.equal(parts.test.pixels, load_images("digits").test.pixels)


def test_fashion_mnist(monkeypatch, tmp_path):
    """The IDX format: magic number, big-endian sizes, bytes."""
    folder = tmp_path / "fashion"
    folder.mkdir()
    for part, count in (("train", 24), ("t10k", 5)):
        pixels = np.arange(count * 28 * 28, dtype=np.int64).reshape(count, 28, 28).astype(np.uint8)
        for kind, values in (("images-idx3", pixels), ("labels-idx1", np.arange(count, dtype=np.uint8) % 10)):
            header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
    monkeypatch.setattr(images, "debian_package", lambda name, file: folder)
    parts = load_images("fashion-mnist", size=14, levels=16)
    assert [len(part) for part in (parts.train, parts.validation, parts.test)] == [22, 2, 5]
    assert parts.test.pixels.shape == (5, 1, 14, 14) and int(parts.test.pixels.max()) < 16
    assert parts.test.labels.tolist() == [0, 1, 2, 3, 4]
    whole = load_images("fashion-mnist").test.pixels
    assert whole[1, 0, 0, :3].tolist() == [16, 17, 18]  # 784 is 3 * 256 + 16
    expected = int((whole[0, 0, :2, :2].float().mean().round() * 16 / 256).floor())
    assert int(parts.test.pixels[0, 0, 0, 0]) == expected


def test_arrays_and_folders(tmp_path):
    pixels = saved(tmp_path / "few.npz", labels=np.arange(12) % 2)
    parts = load_images(str(tmp_path / "few.npz"))
    seen = sorted(image.sum().item() for part in (parts.train, parts.validation, parts.test) for image, _ in part)
    assert seen == sorted(image.sum() for image in pixels.astype(int))  # every image is in one part
    assert parts.train.num_labels == 2
    pictures = pytest.importorskip("PIL.Image", reason="pictures are read by Pillow")
    for i, image in enumerate(pixels):
        (tmp_path / "folder" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        pictures.fromarray(image).save(tmp_path / "folder" / "ab"[i % 2] / f"{i}.png")
    folder = load_images(str(tmp_path / "folder"))
    assert folder.train.num_labels == 2 and folder.train.pixels.shape[1:] == (1, 4, 4)
    batch = collate_images([folder.train[0], folder.train[1]])
    assert batch["pixel_values"].shape == (2, 1, 4, 4) and batch["labels"].dtype == torch.int64


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda path: load_images(str(path / "few.npz"), size=3), "data.size: got 3"),
        (lambda path: load_images(str(path / "few.npz"), levels=300), "data.levels: got 300"),
        (lambda path: load_images(str(path / "nothing")), "does not exist"),
        (lambda path: load_images(str(path)), "holds no pictures"),
        (lambda path: Images(torch.zeros(2, 4, 4), torch.zeros(2), 2), "pixels: expected uint8"),
        (lambda path: Images(torch.full((2, 1, 4, 4), 9, dtype=torch.uint8), torch.zeros(2), 9), "levels: got 9"),
    ],
)
def test_what_does_not_fit_is_named(wrong, message, tmp_path):
    saved(tmp_path / "few.npz")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        wrong(tmp_path)
