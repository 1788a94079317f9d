"""Data sets in memory: every published layout, pixel for pixel, and what goes wrong told by name."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import (
    encode,
    python2_pickle,
    random_pixels,
    write_cifar10_batches,
    write_folders,
    write_parquet,
)
from PIL import Image

from spiking_rl import UserError
from spiking_rl.vision.data import DATASETS, Dataset, channel_statistics, load_dataset
from spiking_rl.vision.data.decode import decode

TRAIN, TEST = 5_020, 7  # so that 20 images are left for training
POOL = 20  # different images; the others repeat them
NAMES = [f"class {c}" for c in range(10)]


def repeated(total: int = TRAIN) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return which of the pool's images each one is; not sorted by class."""
    return np.arange(total) * 7 % POOL


def write_cifar10_parquet(folder: Path, names: list[str] = NAMES, kind: str = "PNG") -> None:
    pool = random_pixels(POOL)
    encoded = [encode(image, kind) for image in pool]
    for shard, rows in enumerate(np.array_split(repeated(), 3)):
        path = folder / f"train-{shard:05}-of-00003.parquet"
        write_parquet(path, [encoded[r] for r in rows], [int(r % 10) for r in rows], names)
    write_parquet(folder / "test-00000-of-00001.parquet", encoded[:TEST], list(range(TEST)), names, rows=3)


def write_cifar10_pickled(folder: Path) -> None:
    pool, which = random_pixels(POOL), repeated()
    write_cifar10_batches(folder, pool[which], [int(w % 10) for w in which], pool[:TEST], list(range(TEST)))


def assert_is_cifar10(loaded: Dataset) -> None:
    pool, which = torch.from_numpy(random_pixels(POOL)), torch.from_numpy(repeated())
    assert torch.equal(loaded.train_images, pool[which[:20]])
    assert torch.equal(loaded.train_labels, which[:20] % 10)
    assert torch.equal(loaded.val_images, pool[which[20:]])
    assert torch.equal(loaded.val_labels, which[20:] % 10)
    assert torch.equal(loaded.test_images, pool[:TEST])
    assert loaded.test_labels.tolist() == list(range(TEST))
    assert loaded.classes == NAMES
    assert loaded.train_images.dtype == torch.uint8
    assert loaded.train_labels.dtype == loaded.test_labels.dtype == torch.int64


WRITERS: dict[str, Callable[[Path], None]] = {
    "cifar10": write_cifar10_parquet,
    "cifar10/plain_text": write_cifar10_parquet,
    ".": lambda folder: write_cifar10_parquet(folder, kind="WEBP"),
    "cifar-10-batches-py": write_cifar10_pickled,
    "cifar10/cifar-10-batches-py": write_cifar10_pickled,
}


@pytest.mark.parametrize("place", WRITERS)
def test_cifar10_is_read_pixel_for_pixel_and_split_in_order(tmp_path: Path, place: str) -> None:
    WRITERS[place](tmp_path / place)
    assert_is_cifar10(load_dataset("cifar10", tmp_path))


def test_the_folder_may_be_the_set_itself_and_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar10_pickled(tmp_path / "cifar-10-batches-py")
    monkeypatch.setenv("SPIKING_RL_DATA", str(tmp_path / "cifar-10-batches-py"))
    assert_is_cifar10(load_dataset("cifar10"))


def test_cifar100_has_its_fine_labels(tmp_path: Path) -> None:
    names = [f"fine {c}" for c in range(100)]
    pixels, labels = random_pixels(POOL), [int(w) for w in np.arange(5_050) * 7 % 100]
    encoded = [encode(pixels[k % POOL]) for k in range(100)]
    write_parquet(tmp_path / "a" / "train.parquet", [encoded[k] for k in labels], labels, names, label="fine_label")
    write_parquet(tmp_path / "a" / "test.parquet", encoded[:3], [99, 0, 1], names, label="fine_label")
    folder = tmp_path / "b" / "cifar-100-python"
    folder.mkdir(parents=True)
    which = np.array(labels) % POOL
    train = {"data": pixels[which].reshape(-1, 3072), "fine_labels": labels, "coarse_labels": [0] * 5_050}
    test = {"data": pixels[:3].reshape(-1, 3072), "fine_labels": [99, 0, 1], "coarse_labels": [0] * 3}
    meta = {"fine_label_names": names, "coarse_label_names": ["coarse"]}
    for file, content in (("train", train), ("test", test), ("meta", meta)):
        (folder / file).write_bytes(python2_pickle(content))
    for place in ("a", "b"):
        loaded = load_dataset("cifar100", tmp_path / place)
        assert loaded.train_labels.tolist() == labels[:50]
        assert loaded.val_labels.tolist() == labels[50:]
        assert loaded.test_labels.tolist() == [99, 0, 1]
        assert loaded.classes == names
        assert torch.equal(loaded.train_images, torch.from_numpy(pixels[which[:50]]))


def test_tiny_imagenet_keeps_its_last_ten_thousand_and_is_scaled_down_to_32(tmp_path: Path) -> None:
    names = [f"n{c:08}" for c in range(200)]
    # Each 2 x 2 block has one colour, so that halving gives the small image back.
    small = random_pixels(4, 32)
    flat = np.full((3, 64, 64), 7, np.uint8)
    images = [encode(flat), *(encode(image) for image in small)]
    labels = [k * 77 % 200 for k in range(10_004)]
    rows = [images[1 + k] if k < 4 else images[0] for k in range(10_004)]
    write_parquet(tmp_path / "train.parquet", rows, labels, names, image="image")
    write_parquet(tmp_path / "valid.parquet", images[:1], [5], names, image="image")
    loaded = load_dataset("tiny-imagenet-32", tmp_path)
    assert torch.equal(loaded.train_images, torch.from_numpy(small))
    assert loaded.val_labels.tolist() == labels[4:]
    assert loaded.val_images.shape == (10_000, 3, 32, 32)
    assert torch.equal(loaded.test_images, torch.full((1, 3, 32, 32), 7, dtype=torch.uint8))


@pytest.mark.parametrize("suffix", [".png", ".webp", ".bmp", ".PNG"])
def test_any_folder_of_classes(tmp_path: Path, suffix: str) -> None:
    pixels = {name: random_pixels(10, 8, seed) for seed, name in enumerate(("ant", "bee", "cat"))}
    write_folders(tmp_path / "train", {name: list(of_class) for name, of_class in pixels.items()}, suffix)
    write_folders(tmp_path / "val", {name: list(of_class[:1]) for name, of_class in pixels.items()}, suffix)
    (tmp_path / "train" / "ant" / "notes.txt").write_text("no image")
    loaded = load_dataset("folder", tmp_path, size=8)
    assert loaded.classes == ["ant", "bee", "cat"]
    assert loaded.test_labels.tolist() == [0, 1, 2]
    assert (len(loaded.train_images), len(loaded.val_images)) == (27, 3)
    # Every image is there once, with its own label.
    seen = set()
    for image, label in zip(
        torch.cat([loaded.train_images, loaded.val_images]),
        torch.cat([loaded.train_labels, loaded.val_labels]).tolist(),
        strict=True,
    ):
        (k,) = (k for k, own in enumerate(pixels[loaded.classes[label]]) if np.array_equal(own, image.numpy()))
        seen.add((label, k))
    assert len(seen) == 30


def test_images_sorted_by_class_are_shuffled_before_the_split_always_alike(tmp_path: Path) -> None:
    for split, count in (("train", 100), ("test", 1)):
        write_folders(tmp_path / split, {f"c{c}": list(random_pixels(count, 2, c)) for c in range(4)})
    first, second = (load_dataset("folder", tmp_path, size=2) for _ in range(2))
    assert first.val_labels.bincount().min() >= 3, "the last tenth would be of one class"
    assert torch.equal(first.val_images, second.val_images)


def test_of_few_images_every_class_is_learned(tmp_path: Path) -> None:
    """Twenty classes of one or two images: the last of them are not kept for validation."""
    counts = {f"c{c:02}": 1 + c % 2 for c in range(20)}
    for split in ("train", "test"):
        write_folders(tmp_path / split, {name: list(random_pixels(n, 2, n)) for name, n in counts.items()})
    assert load_dataset("folder", tmp_path, size=2).val_labels.tolist() != [18, 19, 19]


def test_images_that_are_left_out_are_told_but_for_hidden_ones(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_folders(tmp_path / split, {name: list(random_pixels(10, 2, 0)) for name in ("ant", "bee")})
    ant = tmp_path / "train" / "ant"
    (ant / "._0.png").write_bytes(b"what macOS leaves")
    assert len(load_dataset("folder", tmp_path, size=2).train_labels) == 18
    (ant / "more").mkdir()
    (ant / "one.gif").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"2 left out in .*train, such as .*more: images are .png"):
        assert len(load_dataset("folder", tmp_path, size=2).train_labels) == 18


@pytest.mark.parametrize("order", [[2, 0, 3, 1], [3, 2, 1, 0], [0, 1, 2, 3, 0, 1, 2, 3]])
def test_images_class_by_class_are_shuffled_whatever_the_order_of_classes(tmp_path: Path, order: list[int]) -> None:
    labels = [label for label in order for _ in range(400 // len(order))]
    pool = [encode(pixels) for pixels in random_pixels(4)]
    write_parquet(tmp_path / "train-00000-of-00001.parquet", [pool[label] for label in labels], labels, NAMES[:4])
    write_parquet(tmp_path / "test-00000-of-00001.parquet", pool, [0, 1, 2, 3], NAMES[:4])
    found = load_dataset("folder", tmp_path)
    assert found.val_labels.bincount(minlength=4).min() >= 3
    assert found.train_labels.bincount(minlength=4).min() > 80


def test_pictures_are_turned_as_their_camera_says(tmp_path: Path) -> None:
    stored = np.zeros((4, 4, 3), np.uint8)
    stored[0] = 255  # the upper edge, which a camera held upright saw on the right
    turned = Image.Exif()
    turned[0x0112] = 6
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for k in range(3):
                Image.fromarray(stored).save(tmp_path / split / name / f"{k}.png", exif=turned)
    seen = load_dataset("folder", tmp_path, size=4).test_images[0, 0]
    assert (seen[:, 3] == 255).all()
    assert (seen[:, :3] == 0).all()


def test_a_folder_called_test_beside_the_data_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_x.py").write_text("")
    for split, count in (("train", 20), ("test", 2)):
        write_folders(tmp_path / "data" / split, {f"c{c}": list(random_pixels(count, 2, c)) for c in range(2)})
    assert len(load_dataset("folder", tmp_path, size=2).test_labels) == 4


def test_a_folder_with_all_three_splits_uses_them(tmp_path: Path) -> None:
    for split, count, seed in (("train", 5, 0), ("val", 2, 9), ("test", 3, 19)):
        write_folders(tmp_path / split, {name: list(random_pixels(count, 4, seed)) for name in "ab"})
    loaded = load_dataset("folder", tmp_path, size=4)
    assert [len(i) for i in (loaded.train_images, loaded.val_images, loaded.test_images)] == [10, 4, 6]
    assert torch.equal(loaded.val_images[:2], torch.from_numpy(random_pixels(2, 4, 9)))


def test_a_larger_image_is_cut_to_its_centred_square_and_scaled(tmp_path: Path) -> None:
    wide = np.zeros((3, 8, 16), np.uint8)
    wide[:, :, 4:12] = 200  # the square in the middle
    tall = wide.transpose(0, 2, 1)
    for split in ("train", "test"):
        write_folders(tmp_path / split, {"wide": [wide, wide], "tall": [tall, tall]})
    loaded = load_dataset("folder", tmp_path, size=4)
    assert bool((loaded.test_images == 200).all())


def test_statistics_are_those_of_the_training_images(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_folders(tmp_path / split, {name: list(random_pixels(9, 4, seed)) for seed, name in enumerate("ab")})
    loaded = load_dataset("folder", tmp_path, size=4)
    scaled = loaded.train_images.double() / 255
    torch.testing.assert_close(torch.tensor(loaded.mean).double(), scaled.mean((0, 2, 3)), atol=1e-6, rtol=0)
    expected = scaled.std((0, 2, 3), correction=0)
    torch.testing.assert_close(torch.tensor(loaded.std).double(), expected, atol=1e-6, rtol=0)


def test_it_moves_to_a_device_as_a_whole(tmp_path: Path) -> None:
    write_cifar10_pickled(tmp_path / "cifar-10-batches-py")
    moved = load_dataset("cifar10", tmp_path).to("meta")
    assert {v.device.type for v in moved if isinstance(v, torch.Tensor)} == {"meta"}
    assert (moved.val_images.shape[0], moved.val_labels.shape, moved.test_images.shape[0]) == (5000, (5000,), TEST)
    assert (moved.train_labels.shape, moved.test_labels.shape) == ((20,), (TEST,))


def refused(data: Path | None, *told: str, name: str = "cifar10", **options: Any) -> None:
    """Assert that one line tells all of this."""
    with pytest.raises(UserError) as caught:
        load_dataset(name, data, **options)
    for words in told:
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_cannot_work_is_told_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPIKING_RL_DATA", raising=False)
    refused(None, "SPIKING_RL_DATA")
    refused(None, "StreamedDataset", name="imagenet")
    refused(tmp_path, "cifar-10", "did you mean 'cifar10'", name="cifar-10")
    refused(tmp_path, *DATASETS, name="mnist?")
    refused(tmp_path, "size", "64", size=64)
    refused(tmp_path / "nowhere", "nowhere", "parquet", "train/<class>")
    refused(tmp_path, str(tmp_path), "parquet", "train/<class>", "cifar-10-batches-py")
    refused(tmp_path, "train/<class>", name="folder")


def test_a_missing_pyarrow_is_told_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10_parquet(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(tmp_path, "pip install 'spiking-rl[vision]'", "train-00000-of-00003.parquet")


def test_a_missing_or_foreign_shard(tmp_path: Path) -> None:
    write_cifar10_parquet(tmp_path)
    (tmp_path / "train-00001-of-00003.parquet").unlink()
    refused(tmp_path, "2 file(s)", "one of 3")
    write_cifar10_parquet(tmp_path)
    write_parquet(tmp_path / "train-00001-of-00003.parquet", [b""], [0], [*NAMES[:-1], "another"])
    refused(tmp_path, "train-00001-of-00003.parquet", "other classes")
    (tmp_path / "train-00001-of-00003.parquet").rename(tmp_path / "train-00001-of-00099.parquet")
    refused(tmp_path, "3 file(s)", "remove what is left over")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", "BMP", "TEXT"])
def test_a_damaged_image_is_told_with_its_file_and_row(tmp_path: Path, kind: str) -> None:
    whole = encode(random_pixels(1)[0], kind) if kind != "TEXT" else b"<svg>no image at all</svg>"
    good = encode(random_pixels(1)[0])
    write_parquet(tmp_path / "train.parquet", [good] * 20, [0, 1] * 10, ["a", "b"])
    rows = [good] * 9
    rows[7] = whole[: len(whole) * 2 // 3]
    write_parquet(tmp_path / "test.parquet", rows, [0] * 9, ["a", "b"], rows=4)
    refused(tmp_path, "test.parquet, row 7", "cannot be decoded", name="folder")


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_grey(mode: str) -> None:
    """A black line on nothing, which is stored as black too, stays a line."""
    pixels = np.zeros((8, 8, len(mode)), dtype=np.uint8)
    pixels[3, :, -1] = 255
    pixels[5, :] = 255
    shown = np.asarray(decode(encode(pixels.transpose(2, 0, 1)), "line.png"))
    assert shown.shape == (8, 8, 3)
    assert (shown[3] == 0).all()
    assert (shown[5] == 255).all()
    assert (shown[[0, 1, 2, 4, 6, 7]] == 128).all()


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "EPS"])
def test_other_formats_are_never_decoded(tmp_path: Path, kind: str) -> None:
    for split in ("train", "test"):
        write_folders(tmp_path / split, {"a": list(random_pixels(3, 8))})
    (tmp_path / "test" / "a" / "0001.png").write_bytes(encode(random_pixels(1, 8)[0], kind))
    refused(tmp_path, "0001.png", "no PNG, JPEG, WebP or BMP", name="folder", size=8)


def test_a_row_without_bytes_or_label(tmp_path: Path) -> None:
    good = encode(random_pixels(1)[0])
    write_parquet(tmp_path / "train.parquet", [good] * 20, [0, 1] * 10, ["a", "b"])
    write_parquet(tmp_path / "test.parquet", [good, None], [0, 1], ["a", "b"])
    refused(tmp_path, "test.parquet, row 1", "no image bytes", name="folder")
    write_parquet(tmp_path / "test.parquet", [good, good], [0, None], ["a", "b"])
    refused(tmp_path, "test.parquet", "'label'", name="folder")


def test_a_damaged_file_in_class_folders(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_folders(tmp_path / split, {name: list(random_pixels(5, 8)) for name in "ab"})
    (tmp_path / "train" / "b" / "0003.png").write_bytes(b"")
    refused(tmp_path, "0003.png", "cannot be decoded", name="folder", size=8)


def test_a_damaged_parquet_file(tmp_path: Path) -> None:
    write_cifar10_parquet(tmp_path)
    path = tmp_path / "test-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    refused(tmp_path, path.name, "cannot be read as parquet")


def test_columns_and_class_names_that_are_missing(tmp_path: Path) -> None:
    good = encode(random_pixels(1)[0])
    write_parquet(tmp_path / "train.parquet", [good], [0], ["a"], label="coarse_label")
    refused(tmp_path, "train.parquet", "coarse_label", "'label'")
    import pyarrow.parquet as pq

    write_parquet(tmp_path / "train.parquet", [good], [0], ["a"])
    pq.write_table(pq.read_table(tmp_path / "train.parquet").replace_schema_metadata(None), tmp_path / "train.parquet")
    refused(tmp_path, "train.parquet", "does not name the classes")


@pytest.mark.parametrize("wrong", [-1, 10])
def test_a_label_that_stands_for_no_class(tmp_path: Path, wrong: int) -> None:
    write_cifar10_parquet(tmp_path / "a")
    good = encode(random_pixels(1)[0])
    path = tmp_path / "a" / "test-00000-of-00001.parquet"
    write_parquet(path, [good] * 5, [1, 2, 3, wrong, 4], NAMES, rows=2)
    refused(tmp_path / "a", f"{path.name}, row 3", f"label {wrong}", "0 to 9")
    write_cifar10_batches(tmp_path / "b", random_pixels(5), [0] * 5, random_pixels(1), [wrong])
    refused(tmp_path / "b", "test_batch", f"label {wrong}", "0 to 9")


def test_another_set_under_the_name(tmp_path: Path) -> None:
    write_cifar10_parquet(tmp_path, [*NAMES, "an eleventh"])
    refused(tmp_path, "11 classes", "cifar10 has 10")


def test_training_and_test_classes_must_be_the_same(tmp_path: Path) -> None:
    good = list(random_pixels(5, 8))
    write_folders(tmp_path / "train", {"ant": good, "bee": good})
    write_folders(tmp_path / "test", {"ant": good, "cat": good})
    refused(tmp_path, "differ", "bee", "cat", name="folder", size=8)
    write_cifar10_parquet(tmp_path / "cifar10")
    write_parquet(tmp_path / "cifar10" / "test-00000-of-00001.parquet", [encode(good[0])], [0], NAMES[::-1])
    refused(tmp_path, "in another order")


def test_an_image_that_is_too_small(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_folders(tmp_path / split, {name: list(random_pixels(3, 16)) for name in "ab"})
    refused(tmp_path, "0000.png", "16 x 16", "17", name="folder", size=17)


def test_an_empty_split(tmp_path: Path) -> None:
    write_folders(tmp_path / "train", {"a": list(random_pixels(3, 8))})
    refused(tmp_path, "no test split", name="folder", size=8)
    (tmp_path / "test" / "a").mkdir(parents=True)
    refused(tmp_path, str(tmp_path), "no images", "test", name="folder", size=8)
    (tmp_path / "other" / "train").mkdir(parents=True)
    refused(tmp_path / "other", "no class folders", name="folder")
    good = encode(random_pixels(1)[0])
    for split in ("train", "test"):  # all would be for validation
        write_parquet(tmp_path / f"{split}.parquet", [good] * 5_000, [1, 0] * 2_500, NAMES)
    refused(tmp_path, "5000 training", "split empty")


@pytest.mark.skipif("SPIKING_RL_DATA" not in os.environ, reason="SPIKING_RL_DATA names no folder of real data")
@pytest.mark.parametrize(
    ("name", "classes", "mean", "std"),
    [
        ("cifar10", ["airplane", "truck"], (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ("cifar100", ["apple", "worm"], (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    ],
)
def test_real_data_have_the_published_statistics(
    name: str, classes: list[str], mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    loaded = load_dataset(name)
    assert [len(i) for i in (loaded.train_images, loaded.val_images, loaded.test_images)] == [45_000, 5_000, 10_000]
    assert [loaded.classes[0], loaded.classes[-1]] == classes
    published = channel_statistics(torch.cat([loaded.train_images, loaded.val_images]))
    assert published == (pytest.approx(mean, abs=6e-5), pytest.approx(std, abs=6e-5))
    assert loaded.mean == pytest.approx(mean, abs=1e-3)
    assert loaded.std == pytest.approx(std, abs=1e-3)


def test_shades_of_sixteen_bits_stay_shades() -> None:
    """Pillow alone makes all but the darkest of them white."""
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    raw = io.BytesIO()
    Image.fromarray(ramp).save(raw, format="PNG")
    shades = np.asarray(decode(raw.getvalue(), "ramp"))
    assert shades.shape == (16, 16, 3)
    assert (shades == np.arange(256).reshape(16, 16, 1)).all()
