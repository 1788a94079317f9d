"""Write frames as an mp4 that browsers play."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterable
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]

_SECONDS = 20.0  # that one picture may take
_PNG = b"\x89PNG"


def write_video(path: Path | str, frames: Iterable[Frame], fps: float, quality: int = 7) -> int:
    """Write an H.264 mp4; a partial file is never left under the final name.

    Args:
        path: ends with ``.mp4``; its folder is made.
        frames: RGB pictures of one size, ``(H, W, 3)``; an odd edge loses one pixel, which H.264
            cannot store.
        fps: frames per second.
        quality: 0 to 10; a step less makes a film of drawings a quarter smaller.

    Returns:
        The number of frames.

    Raises:
        OSError: the file cannot be written.
        ValueError: there was no frame.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial.mp4")
    partial.touch()  # what stands in the way is told by us: the encoder would tell it in a dozen lines
    writer = None
    count = 0
    try:
        for frame in frames:
            even = np.ascontiguousarray(frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2])
            if writer is None:
                size = (even.shape[1], even.shape[0])
                options = ["-movflags", "+faststart"]  # lets a browser start before it has the whole file
                writer = imageio_ffmpeg.write_frames(
                    str(partial), size, fps=fps, quality=quality, macro_block_size=2, output_params=options
                )
                writer.send(None)
            writer.send(even)
            count += 1
        if writer is None:
            raise ValueError("a video needs at least one frame")
        writer.close()
        writer = None
        # The encoder's exit status is lost on the way here: believe only what can be decoded.
        try:
            complete = imageio_ffmpeg.count_frames_and_secs(str(partial))[0] == count
        except (RuntimeError, OSError):
            complete = False
        if not complete:
            raise OSError(errno.EIO, "the video could not be written whole (is the disk full?)", str(path))
        partial.replace(path)
    finally:
        if writer is not None:
            writer.close()
        partial.unlink(missing_ok=True)
    return count


def still(path: Path, before_end: float = 2.0) -> bytes | None:
    """Return one picture of an mp4 as PNG; None where there is none to be had.

    Args:
        path: of the film.
        before_end: seconds before its end; of a shorter film it is the first picture.
    """
    # Only as an mp4, and no other file or address that it may name: it may be anybody's.
    only = ["-v", "error", "-protocol_whitelist", "file", "-f", "mp4", "-sseof", f"{-before_end:g}", "-i", str(path)]
    picture = ["-frames:v", "1", "-f", "image2pipe", "-c:v", "png", "pipe:1"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), *only, *picture]
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 and done.stdout.startswith(_PNG) else None
