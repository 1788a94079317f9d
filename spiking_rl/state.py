"""Parts of a training state that every trainer saves: optimiser, random generators, hashes of the files."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray

from spiking_rl.errors import UserError
from spiking_rl.files import read_bounded, require_regular, sha256_of

_MAX_TENSOR_BYTES = 16 * 2**30  # weights, their average and the optimiser's moments

ADAM = ("step", "exp_avg", "exp_avg_sq")
"""What Adam keeps of a parameter."""

MOMENTUM = ("momentum_buffer",)
"""What SGD and Muon keep of a parameter."""

_MOMENTS = {torch.optim.Adam: ADAM, torch.optim.RAdam: ADAM, torch.optim.SGD: MOMENTUM}

REMEDY = "start the run again in another folder, or name the run's checkpoints instead"
"""What to do where a training state cannot be continued."""


def hashes_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder, by its path in it."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): sha256_of(path) for path in files}


def verify(folder: Path, hashes: dict[str, str]) -> None:
    """Refuse files that are not those of :func:`hashes_of`.

    Raises:
        UserError: one is missing, truncated, altered, or outside the folder.
    """
    for name, digest in hashes.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError("resume", name, f"points outside the run folder; {REMEDY}")
        if not path.is_file() or sha256_of(path) != digest:
            raise UserError("resume", str(path), f"is missing, truncated or altered; {REMEDY}")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file of a training state.

    Raises:
        OSError: missing, too large, or no regular file.
        ValueError: not a safetensors file.
    """
    try:
        return safetensors.torch.load(read_bounded(path, _MAX_TENSOR_BYTES))
    except (safetensors.SafetensorError, KeyError) as error:
        raise ValueError(f"{path.name} is not a safetensors file ({error})") from None


def read_array(path: Path) -> NDArray[Any]:
    """Read a .npy file; what its header says of its size must be there before memory is taken for it.

    Raises:
        OSError: missing, or no regular file.
        ValueError: not such a file, or not whole.
    """
    require_regular(path)
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # damaged headers raise many types: EOFError, SyntaxError, tokenize.TokenError ...
        raise ValueError(f"{path.name} is not an array ({error})") from None
    if not isinstance(mapped, np.ndarray):  # an archive of several
        raise ValueError(f"{path.name} is not an array")
    return np.array(mapped)


def pack_optimiser(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split an optimiser's state into tensors and JSON scalars."""
    tensors, scalars = {}, {}
    for index, slots in optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            key = f"optimiser.{index}.{name}"
            if isinstance(value, torch.Tensor):
                tensors[key] = value.cpu().contiguous()
            else:
                scalars[key] = value
    return tensors, scalars


def unpack_optimiser(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], scalars: dict[str, Any]
) -> None:
    """Restore :func:`pack_optimiser`; the groups are those of the fresh optimiser.

    Raises:
        ValueError: a parameter has other moments than the optimiser keeps, or of another shape.
    """
    packed: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **scalars}.items():
        if key.startswith("optimiser."):
            _, index, name = key.split(".", 2)
            if torch.is_tensor(value) and not value.is_floating_point():
                raise ValueError("the optimiser's moments are not those of the network")
            packed.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": packed, "param_groups": optimizer.state_dict()["param_groups"]})
    for group in optimizer.param_groups:
        kept = {*_moments(optimizer, group), *(["max_exp_avg_sq"] if group.get("amsgrad") else [])}
        for parameter in group["params"]:
            slots = optimizer.state.get(parameter, {})
            shapes = {name: () if name == "step" else tuple(parameter.shape) for name in kept}
            found = {n: tuple(t.shape) for n, t in slots.items() if torch.is_tensor(t) and t.is_floating_point()}
            if slots and (len(slots) != len(found) or found != shapes):
                raise ValueError("the optimiser's moments are not those of the network")
            if not slots and isinstance(optimizer, torch.optim.SGD) and packed:
                # A parameter that had no gradient so far; a fused step wants a buffer of all, or none. 0 is as good.
                slots = optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
            if "step" in slots:
                slots["step"] = slots["step"].float()  # in which torch counts, whatever the file has
            for name in kept - {"step"} if slots else ():  # fused optimisers read memory in the parameter's order
                slots[name] = torch.empty_like(parameter).copy_(slots[name])


def _moments(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> tuple[str, ...]:
    """Return what is kept of the parameters of a group, which says so itself where groups differ."""
    own: tuple[str, ...] | None = group.get("moments")
    return _MOMENTS[type(optimizer)] if own is None else own


def seed_generator(seed: int, device: torch.device) -> None:
    """Seed the global generator that draws on a device, and the CPU's.

    :func:`torch.manual_seed` writes down its callers besides, for accelerators that were not used yet: 1 ms a call.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def generators() -> dict[str, Any]:
    """Return the state of every global random generator, JSON-serialisable."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    python = random.getstate()
    return {
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "python": [python[0], list(python[1]), python[2]],
        "torch": torch.get_rng_state().tolist(),
        "cuda": [s.tolist() for s in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def restore_generators(state: dict[str, Any]) -> None:
    """Restore :func:`generators`."""
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([torch.tensor(s, dtype=torch.uint8) for s in state["cuda"]])
