"""Images streamed from disk: each once, with its label, the same from the same seed, whoever decodes them."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import encode, write_folders, write_parquet
from PIL import Image
from torch import Tensor

from spiking_rl import UserError
from spiking_rl.vision.data import ImageStream
from spiking_rl.vision.data.decode import centre_crop, pixels, random_crop_box, random_resized_crop

# On a machine of one core the loader warns of a second worker.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

CLASSES = ["n01440764", "n01443537", "n01484850"]
COUNT = 54


def plain(index: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Return an image of one colour that tells its number, of a size of its own, some small or long."""
    return np.full((3, 20 + index % 7 * 9, 90 - index), 4 * index, np.uint8)


def number_of(images: Tensor) -> list[int]:
    return [round(float(image.float().mean()) / 4) for image in images]


@pytest.fixture(params=["folders", "parquet"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a folder with 54 training images; number k is of class k % 3."""
    if request.param == "folders":
        for split in ("train", "val"):
            of_class = {name: [plain(k) for k in range(c, COUNT, 3)] for c, name in enumerate(CLASSES)}
            write_folders(tmp_path / split, of_class, ".JPEG")
    else:
        for split, of in (("train", 3), ("validation", 1)):
            for shard, rows in enumerate(np.array_split(np.arange(COUNT), of)):
                path = tmp_path / "imagenet" / "data" / f"{split}-{shard:05}-of-{of:05}.parquet"
                images = [encode(plain(int(k)), "JPEG") for k in rows]
                write_parquet(path, images, [int(k) % 3 for k in rows], CLASSES, image="image", rows=5)
    return tmp_path


def collect(batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("split", ["train", "val"])
def test_every_image_comes_once_with_its_label(data: Path, split: str, workers: int) -> None:
    stream = ImageStream(data, split, size=16)
    assert len(stream) == COUNT
    assert stream.classes == CLASSES
    images, labels = collect(stream.batches(10, augmented=False, workers=workers))
    assert images.dtype == torch.uint8
    assert images.shape == (COUNT, 3, 16, 16)
    numbers = number_of(images)
    assert sorted(numbers) == list(range(COUNT))
    assert labels.tolist() == [k % 3 for k in numbers]


@pytest.mark.parametrize("workers", [0, 2])
def test_augmented_batches_are_whole_mixed_and_the_same_from_the_same_seed(data: Path, workers: int) -> None:
    stream = ImageStream(data, size=8, seed=3)
    first, again, later = (list(stream.batches(5, augmented=True, epoch=epoch, workers=workers)) for epoch in (0, 0, 1))
    assert len(first) == COUNT // 5  # with two workers 27 images each: ten whole batches too
    assert all(images.shape == (5, 3, 8, 8) for images, _ in first)
    for (images, labels), (same_images, same_labels) in zip(first, again, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)
        assert labels.tolist() == [k % 3 for k in number_of(images)]
    orders = [[k for images, _ in seen for k in number_of(images)] for seen in (first, later)]
    assert orders[0] != orders[1]
    assert len(set(orders[0])) == 50, "no image twice"
    assert sum(abs(a - b) == 3 for a, b in zip(orders[0], orders[0][1:], strict=False)) < 20, "hardly mixed"
    other = ImageStream(data, size=8, seed=4).batches(5, augmented=True, workers=workers)
    assert number_of(next(other)[0]) != number_of(first[0][0])


def test_what_becomes_of_an_image_does_not_depend_on_the_workers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (3, 40, 30), dtype=np.uint8)] * 6
    write_folders(tmp_path / "train", {"a": noise, "b": noise})
    stream = ImageStream(tmp_path, size=8)
    alone, shared = (
        {bytes(image.numpy().tobytes()) for image in collect(stream.batches(1, augmented=True, workers=w))[0]}
        for w in (0, 2)
    )
    assert len(alone) == 12, "copies of one image are cropped in different ways"
    assert alone == shared
    epoch1 = collect(stream.batches(1, augmented=True, epoch=1))[0]
    assert not alone & {image.numpy().tobytes() for image in epoch1}


def test_images_that_are_read_together_are_mixed_anew_in_every_epoch(tmp_path: Path) -> None:
    images = [encode(plain(k)) for k in range(20)]
    write_parquet(tmp_path / "train.parquet", images, [0] * 20, CLASSES, image="image", rows=20)
    stream = ImageStream(tmp_path, size=8)
    orders = [number_of(next(stream.batches(20, augmented=True, epoch=epoch))[0]) for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(20))
    assert orders[0] != orders[1]
    assert list(range(20)) not in orders


def test_streaming_leaves_the_global_generator_alone(data: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    collect(ImageStream(data, size=8).batches(5, augmented=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_random_crops_lie_in_the_image_and_cover_what_they_should() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([random_crop_box(100, 80, rng) for _ in range(2000)])
    left, top, right, bottom = boxes.T
    assert left.min() == top.min() == 0
    assert right.max() == 100
    assert bottom.max() == 80
    shares = (right - left) * (bottom - top) / 8000
    ratios = (right - left) / (bottom - top)
    assert 0.07 < shares.min() < 0.1
    assert 0.9 < shares.max() <= 1
    assert 0.72 < ratios.min() < 0.8
    assert 1.25 < ratios.max() < 1.38
    assert abs(np.log(ratios).mean()) < 0.03


@pytest.mark.parametrize(("width", "height"), [(1000, 10), (10, 1000), (1, 1), (1, 50)])
def test_a_crop_of_a_very_long_image_is_the_centre(width: int, height: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        left, top, right, bottom = random_crop_box(width, height, rng)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert (right - left) / (bottom - top) <= 4 / 3 + 0.1
    if min(width, height) == 10:
        assert abs(left + right - width) <= 1
        assert abs(top + bottom - height) <= 1


def test_half_of_the_random_crops_are_mirrored() -> None:
    ramp = Image.fromarray(np.tile(np.arange(0, 200, 2, dtype=np.uint8)[None, :, None], (60, 1, 3)))
    rng = np.random.default_rng(0)
    rising = sum(
        int(out[0, 0, -1]) > int(out[0, 0, 0])
        for out in (pixels(random_resized_crop(ramp, 8, rng)) for _ in range(400))
    )
    assert 150 < rising < 250


def test_a_strip_of_pixels_is_cut_before_it_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaled up first, one of 60,000 x 1 would take 15 GB."""
    sizes = []
    resize = Image.Image.resize

    def spy(image: Image.Image, size: tuple[int, int], *args: object) -> Image.Image:
        sizes.append(size)
        return resize(image, size, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", spy)
    strip = np.tile(np.linspace(0, 255, 20001).astype(np.uint8)[None, :, None], (1, 1, 3))
    for turned in (strip, strip.transpose(1, 0, 2)):
        out = pixels(centre_crop(Image.fromarray(turned), 64))
        assert out.shape == (3, 64, 64)
        assert abs(int(out.mean()) - 127) <= 1, "the centre"
    assert max(map(max, sizes)) < 1000


def test_evaluation_cuts_out_the_centre_of_the_scaled_image() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 300, 3), dtype=np.uint8)
    assert np.array_equal(pixels(centre_crop(Image.fromarray(noise), 224)), noise[16:240, 38:262].transpose(2, 0, 1))
    # Twice as large, in blocks of two by two: the same picture but for the rounding of the edges.
    ramp = np.tile(np.linspace(0, 255, 512)[:, None, None], (1, 700, 3)).astype(np.uint8)
    out = pixels(centre_crop(Image.fromarray(ramp), 224))
    assert out.shape == (3, 224, 224)
    assert math.isclose(out[0, 0, 0], 255 * 16.5 / 256, abs_tol=2)
    assert math.isclose(out[0, -1, 0], 255 * 239.5 / 256, abs_tol=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_told_by_name_whoever_meets_it(data: Path, workers: int) -> None:
    if (data / "train").is_dir():
        broken = data / "train" / CLASSES[1] / "0004.JPEG"
        broken.write_bytes(broken.read_bytes()[:100])
        name = broken.name
    else:
        images = [encode(plain(k), "JPEG") for k in range(18)]
        images[8] = images[8][:100]
        path = data / "imagenet" / "data" / "train-00001-of-00003.parquet"
        write_parquet(path, images, [0] * 18, CLASSES, image="image", rows=5)
        name = f"{path.name}, row 8"
    with pytest.raises(UserError, match="cannot be decoded") as caught:
        collect(ImageStream(data, size=8).batches(4, augmented=True, workers=workers))
    assert name in str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_process_group_leaves_the_workers_to_the_trainer(data: Path, number: int) -> None:
    others = multiprocessing.active_children()
    batches = ImageStream(data, size=8).batches(4, augmented=True, workers=2)
    first = torch.cat([next(batches)[0], next(batches)[0]])  # one of each worker: both have begun
    workers = [worker for worker in multiprocessing.active_children() if worker not in others]
    assert len(workers) == 2
    for worker in workers:
        assert worker.pid is not None
        os.kill(worker.pid, number)
    rest, _ = collect(batches)
    whole, _ = collect(ImageStream(data, size=8).batches(4, augmented=True, workers=2))
    assert torch.equal(torch.cat([first, rest]), whole)
    for worker in workers:
        worker.join(20)
        assert worker.exitcode == 0, "they end by themselves"


def test_a_file_that_vanishes_is_told_by_name(tmp_path: Path) -> None:
    write_folders(tmp_path / "train", {"a": [plain(1), plain(2)]})
    stream = ImageStream(tmp_path, size=8)
    (tmp_path / "train" / "a" / "0001.png").unlink()
    with pytest.raises(UserError, match=r"0001\.png.*cannot be read"):
        collect(stream.batches(1, augmented=False))


def test_what_cannot_work_is_told_before_anything_is_decoded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="parquet"):
        ImageStream(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no train split.*parquet.*train/<class>"):
        ImageStream(tmp_path)
    with pytest.raises(UserError, match=r"'eval'.*train, val, test"):
        ImageStream(tmp_path, "eval")
    with pytest.raises(UserError, match="size = 0"):
        ImageStream(tmp_path, size=0)
    write_folders(tmp_path / "train", {"a": [plain(1)]})
    # The hub's test split of ImageNet has no labels.
    write_parquet(tmp_path / "test.parquet", [encode(plain(1))] * 2, [0, -1], CLASSES)
    with pytest.raises(UserError, match=r"test\.parquet, row 1.*label -1"):
        ImageStream(tmp_path, "test")
    stream = ImageStream(tmp_path)
    with pytest.raises(UserError, match="batch_size = 0"):
        stream.batches(0, augmented=True)
    with pytest.raises(UserError, match="workers = -1"):
        stream.batches(1, augmented=True, workers=-1)


def test_the_one_error_travels_between_processes() -> None:
    error = UserError("data", "a.png", "cannot be read; remove it")
    copied = pickle.loads(pickle.dumps(error))
    assert (str(copied), copied.field, copied.value) == (str(error), "data", "a.png")
