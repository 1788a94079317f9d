"""Where data lies: the folder that is named, and the layouts that are understood in it."""

from __future__ import annotations

import os
from pathlib import Path

from spiking_rl.errors import UserError
from spiking_rl.vision.data.parquet import find_shards, open_parquet
from spiking_rl.vision.data.sources import ImageSource, open_class_folders

VARIABLE = "SPIKING_RL_DATA"
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
"""Names under which a split may lie."""
UNDERSTOOD = (
    "train-00000-of-00003.parquet ... and test-*.parquet (or valid-*, validation-*), as on the Hugging Face hub; "
    "train/<class>/*.png and test/<class>/*.png (or val/; also jpg, jpeg, webp, bmp)"
)


def data_folder(data: Path | str | None) -> Path:
    """Return the folder of the data: the one given, else that of the environment variable SPIKING_RL_DATA.

    Raises:
        UserError: none is given, or it does not exist.
    """
    chosen = data if data is not None else os.environ.get(VARIABLE)
    if not chosen:
        raise UserError("data", data, f"name the folder that holds the data, here or in the variable {VARIABLE}")
    if not Path(chosen).is_dir():
        raise UserError("data", str(chosen), f"is no folder; it should hold {UNDERSTOOD}")
    return Path(chosen)


def open_split(folder: Path, split: str, label: str = "label") -> ImageSource | None:
    """Open the images of a split in whichever layout they are; None if there are none.

    Args:
        folder: holds parquet shards or the split's folder.
        split: ``"train"``, ``"val"`` or ``"test"``.
        label: label column of parquet files.

    Raises:
        UserError: what is there is incomplete or damaged.
    """
    for name in SPLITS[split]:
        if shards := find_shards(folder, name):
            return open_parquet(shards, label)
        if (folder / name).is_dir():
            return open_class_folders(folder / name)
    return None
