"""Checkpoints: weights as safetensors, everything else as JSON; nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from spiking_rl.errors import UserError
from spiking_rl.files import being_replaced, read_bounded, replace_folder

FORMAT = "spiking-rl checkpoint"
FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")  # of file managers
_MAX_CONFIG_BYTES = 16 * 2**20
_MAX_WEIGHT_BYTES = 4 * 2**30  # VGG16 for ImageNet, the largest network here, has 0.55


class Checkpoint(NamedTuple):
    """A loaded checkpoint: ``tensors`` by name, and the ``config`` saved with them."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]


def save_checkpoint(folder: Path | str, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write a checkpoint folder atomically, replacing one that is there.

    Args:
        folder: receives ``model.safetensors`` and ``config.json``.
        tensors: weights and buffers by name.
        config: JSON-serialisable; ``format``, ``format_version`` and ``sha256`` are added.

    Raises:
        UserError: something else than a checkpoint is there, which would be lost, or the config is no JSON. Nothing is
            written then.
        OSError: the folder cannot be written; the old checkpoint stays.
    """
    _require_own(Path(folder))
    plain: dict[str, Tensor] = {}
    stored: set[int] = set()  # safetensors takes no two tensors of one memory, as of a map that serves two layers
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        plain[name] = own.clone() if own.untyped_storage().data_ptr() in stored else own
        stored.add(own.untyped_storage().data_ptr())
    blob = safetensors.torch.save(plain)
    ours = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "sha256": hashlib.sha256(blob).hexdigest(),
    }
    # Ours win over a config that was loaded with an older checkpoint.
    text = _as_json(ours | {name: value for name, value in config.items() if name not in ours})
    with replace_folder(Path(folder)) as partial:
        (partial / WEIGHTS).write_bytes(blob)
        (partial / CONFIG).write_text(text + "\n")


def _as_json(config: dict[str, Any]) -> str:
    try:
        return json.dumps(config, indent=2, allow_nan=False, default=plain_number)
    except (TypeError, ValueError) as error:
        if len(config) == 1:
            raise UserError(
                "config", next(iter(config)), f"cannot be written as JSON ({error}); leave it out"
            ) from None
        for name, value in config.items():  # one of them names itself
            _as_json({name: value})
        raise


def _require_own(folder: Path) -> None:
    """Refuse to replace what holds more than a checkpoint."""
    remedy = "would be lost; name a new folder, or one with a checkpoint alone"
    if folder.exists() and not folder.is_dir():
        raise UserError("folder", str(folder), f"is a file, which {remedy}")
    others = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    others = [name for name in others if name not in (WEIGHTS, CONFIG, *_LITTER)]
    if others:
        raise UserError("folder", str(folder), f"holds {', '.join(others[:3])}, which {remedy}")


def plain_number(value: Any) -> Any:
    """Return scalars of NumPy and torch as JSON has them: the ``default`` of ``json.dumps``.

    Raises:
        TypeError: something else.
    """
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.dim() == 0):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON-serialisable")


def read_json(path: Path, field: str = "checkpoint") -> dict[str, Any]:
    """Read a JSON object from a file of bounded size.

    Raises:
        UserError: missing, too large, or not a JSON object.
    """
    try:
        loaded = json.loads(read_bounded(path, _MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(field, str(path), f"cannot be read ({error}); name another, or train again") from None
    if not isinstance(loaded, dict):
        raise UserError(field, str(path), "does not hold a JSON object; it is not one of ours")
    return loaded


def load_checkpoint(folder: Path | str) -> Checkpoint:
    """Read a checkpoint folder and verify it.

    Raises:
        UserError: missing, foreign, truncated or altered; the message names the file.
    """
    for attempt in range(20):
        try:
            return _load(Path(folder))
        except UserError:
            # A trainer may be replacing it at this moment; the new one is complete a moment later.
            if attempt == 19 or not (Path(folder).is_dir() or being_replaced(Path(folder))):
                raise
            time.sleep(0.01)
    raise AssertionError("unreachable")


def _load(folder: Path) -> Checkpoint:
    if not folder.is_dir():
        folder = being_replaced(folder) or folder
    if not (folder / CONFIG).is_file():
        raise UserError(
            "checkpoint", str(folder), f"holds no {CONFIG}; name a run or one of its checkpoints/T… folders"
        )
    config = read_json(folder / CONFIG)
    if config.get("format") != FORMAT:
        raise UserError("checkpoint", str(folder), f"is not a {FORMAT} (config.json has another format)")
    if config.get("format_version") != FORMAT_VERSION:
        raise UserError(
            "checkpoint",
            str(folder),
            f"has format version {config.get('format_version')!r}, this release reads {FORMAT_VERSION}; "
            "use the release that wrote it",
        )
    try:
        blob = read_bounded(folder / WEIGHTS, _MAX_WEIGHT_BYTES)
    except OSError as error:
        raise UserError("checkpoint", str(folder / WEIGHTS), f"cannot be read ({error.strerror})") from None
    if hashlib.sha256(blob).hexdigest() != config.get("sha256"):
        raise UserError(
            "checkpoint", str(folder / WEIGHTS), "is truncated or altered (its SHA-256 differs from config.json)"
        )
    try:
        return Checkpoint(safetensors.torch.load(blob), config)
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError("checkpoint", str(folder / WEIGHTS), f"is not a safetensors file ({error})") from None


def load_into(module: nn.Module, tensors: dict[str, Tensor], origin: Path | str) -> None:
    """Load tensors into a module, refusing any mismatch with one line.

    Raises:
        UserError: names, shapes or kinds of numbers differ; nothing is loaded then.
    """
    wrong = misfits(module, tensors)
    if wrong:
        raise UserError("checkpoint", str(origin), f"does not fit this network: {'; '.join(wrong)[:200]}")
    module.load_state_dict(tensors)


def misfits(module: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """Tell in what tensors differ from those that a module has."""
    own = module.state_dict()
    wrong = []
    for name in (name for name in own if name in tensors):
        new, old = tensors[name], own[name]
        if new.shape != old.shape:
            wrong.append(f"size mismatch for {name}: {tuple(new.shape)}, and the network has {tuple(old.shape)}")
        elif new.is_floating_point() != old.is_floating_point():  # torch would drop what does not fit
            wrong.append(f"{name} is {new.dtype}, and in the network {old.dtype}")
    wrong += [f"Missing key {name}" for name in own if name not in tensors]
    return wrong + [f"Unexpected key {name}" for name in tensors if name not in own]
