"""Videos can be played: right length, size and colours; nothing half-written is left behind."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from numpy.typing import NDArray

from spiking_rl.envs.video import write_video

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def plain(colour: tuple[int, int, int], height: int = 64, width: int = 96) -> NDArray[np.uint8]:
    return np.full((height, width, 3), colour, dtype=np.uint8)


def decoded(path: Path, height: int = 64, width: int = 96) -> tuple[NDArray[np.uint8], str]:
    """Return the pictures, and what the decoder says of the file."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3), done.stderr.decode()


@pytest.mark.parametrize("count", [1, 2, 45])
def test_every_frame_is_in_the_video(tmp_path: Path, count: int) -> None:
    path = tmp_path / "made" / "episode.mp4"
    assert write_video(path, (plain(RED) for _ in range(count)), fps=30) == count
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(path))
    assert frames == count
    assert seconds == pytest.approx(count / 30, abs=0.05)
    assert [p.name for p in path.parent.iterdir()] == ["episode.mp4"]


def test_frames_keep_their_order_and_colours(tmp_path: Path) -> None:
    colours = [RED, GREEN, BLUE]
    write_video(str(tmp_path / "a.mp4"), [plain(c) for c in colours for _ in range(3)], fps=10)
    frames, told = decoded(tmp_path / "a.mp4")
    assert len(frames) == 9
    assert re.search(r"Video: h264 .*yuv420p.* 10 fps", told), "browsers play nothing else"
    for i, colour in enumerate(colours):
        np.testing.assert_allclose(frames[3 * i + 1].mean((0, 1)), colour, atol=20)


@pytest.mark.parametrize(("height", "width"), [(65, 97), (65, 96), (64, 97), (210, 160), (400, 601)])
def test_an_odd_edge_loses_one_pixel(tmp_path: Path, height: int, width: int) -> None:
    # Left half red, right half blue: a shifted row would mix them.
    frame = np.concatenate([plain(RED, height, width // 2), plain(BLUE, height, width - width // 2)], axis=1)
    write_video(tmp_path / "a.mp4", [frame] * 3, fps=30)
    frames, told = decoded(tmp_path / "a.mp4", height // 2 * 2, width // 2 * 2)
    assert f", {width // 2 * 2}x{height // 2 * 2}" in told
    assert len(frames) == 3
    np.testing.assert_allclose(frames[1][:, : width // 2 - 8].mean((0, 1)), RED, atol=20)
    np.testing.assert_allclose(frames[1][:, width // 2 + 8 :].mean((0, 1)), BLUE, atol=20)


def test_frames_that_are_views_are_written_as_seen(tmp_path: Path) -> None:
    wide = np.concatenate([plain(RED), plain(BLUE)], axis=1)
    write_video(tmp_path / "a.mp4", [wide[:, 96:][::-1, ::-1]] * 2, fps=30)
    np.testing.assert_allclose(decoded(tmp_path / "a.mp4")[0][0].mean((0, 1)), BLUE, atol=20)


class Broken(Exception):
    """What a renderer raises."""


def breaking(after: int) -> Iterator[NDArray[np.uint8]]:
    for _ in range(after):
        yield plain(GREEN)
    raise Broken


@pytest.mark.parametrize("after", [0, 1, 5])
@pytest.mark.parametrize("older", [True, False])
def test_frames_that_fail_leave_no_partial_file(tmp_path: Path, after: int, older: bool) -> None:
    path = tmp_path / "a.mp4"
    if older:
        path.write_bytes(b"an older video")
    with pytest.raises(Broken):
        write_video(path, breaking(after), fps=30)
    assert [p.name for p in tmp_path.iterdir()] == (["a.mp4"] if older else [])
    assert not older or path.read_bytes() == b"an older video"


def test_no_frame_is_no_video(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        write_video(tmp_path / "a.mp4", [], fps=30)
    assert list(tmp_path.iterdir()) == []


def test_a_video_replaces_an_older_one(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"an older video")
    write_video(tmp_path / "a.mp4", [plain(RED)] * 4, fps=30)
    assert imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "a.mp4"))[0] == 4


def test_a_folder_that_cannot_be_made_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        write_video(tmp_path / "file" / "a.mp4", [plain(RED)], fps=30)


# imageio_ffmpeg leaves the pipe of a dead encoder open.
@pytest.mark.filterwarnings("ignore:.*:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("count", [3, 300])
@pytest.mark.parametrize("older", [True, False])
def test_a_full_disk_is_an_error_and_keeps_the_older_video(tmp_path: Path, count: int, older: bool) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.mp4"
    if older:
        path.write_bytes(b"an older video")
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # as small a disk as can be had
    try:
        with pytest.raises(OSError):  # noqa: PT011 (the text is the system's)
            write_video(path, [noise] * count, fps=30)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == (["a.mp4"] if older else [])
    assert not older or path.read_bytes() == b"an older video"
