"""Checkpoints: what is saved comes back, what is damaged is refused, and nothing is ever executed."""

from __future__ import annotations

import hashlib
import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from spiking_rl import UserError, build_network, load_checkpoint, save_checkpoint
from spiking_rl.checkpoint import CONFIG, WEIGHTS, load_into, read_json

TENSORS = {
    "float32": torch.arange(6.0).reshape(2, 3),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "float64": torch.tensor([1 / 3], dtype=torch.float64),
    "bfloat16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "int64": torch.tensor([2**40, -1]),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(0.25),
    "empty": torch.zeros(0, 3),
    "parameter": nn.Parameter(torch.ones(2)),
    "odd values": torch.tensor([float("nan"), float("inf"), -0.0]),
}
SETTINGS = {"network": "mlp", "timesteps": 3, "hidden": [8, 8], "nested": {"a": None, "b": [1.5, True, "ü"]}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a checkpoint as it should be."""
    save_checkpoint(tmp_path / "T3", {"w": torch.arange(100.0)}, SETTINGS)
    return tmp_path / "T3"


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def replace_weights(folder: Path, blob: bytes) -> None:
    """Put other bytes in place of the weights, with a hash that fits them."""
    (folder / WEIGHTS).write_bytes(blob)
    edit(folder, sha256=hashlib.sha256(blob).hexdigest())


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "new" / "T5", TENSORS, SETTINGS)
    tensors, config = load_checkpoint(str(tmp_path / "new" / "T5"))
    assert tensors.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        assert tensors[name].dtype == expected.dtype
        torch.testing.assert_close(tensors[name], expected.detach(), rtol=0, atol=0, equal_nan=True)
    assert {key: config[key] for key in SETTINGS} == SETTINGS
    assert sorted(p.name for p in (tmp_path / "new" / "T5").iterdir()) == [CONFIG, WEIGHTS]


def test_a_network_comes_back(tmp_path: Path) -> None:
    networks = [build_network("mlp", (4,), 2, hidden=(8,), timesteps=2, threshold=t) for t in (0.3, 0.9)]
    save_checkpoint(tmp_path / "a", networks[0].state_dict(), {})
    load_into(networks[1], load_checkpoint(tmp_path / "a").tensors, tmp_path / "a")
    for name, value in networks[0].state_dict().items():
        assert torch.equal(networks[1].state_dict()[name], value)


def test_a_checkpoint_is_replaced_whole(folder: Path) -> None:
    save_checkpoint(folder, {"other": torch.ones(2)}, {"timesteps": 2})
    tensors, config = load_checkpoint(folder)
    assert tensors.keys() == {"other"}
    assert config["timesteps"] == 2
    assert "network" not in config


def test_a_folder_that_holds_more_than_a_checkpoint_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "thesis.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.chdir(folder)
    for place in (folder, Path()):
        with pytest.raises(UserError, match=r"folder = .*holds thesis.txt, which would be lost"):
            save_checkpoint(place, {"w": torch.zeros(1)}, {})
    with pytest.raises(UserError, match=r"thesis.txt'?: is a file"):
        save_checkpoint(folder / "thesis.txt", {"w": torch.zeros(1)}, {})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "nothing hidden is left"
    (folder / "thesis.txt").rename(folder / ".DS_Store")
    save_checkpoint(folder, {"w": torch.ones(1)}, {})
    assert load_checkpoint(folder).tensors["w"] == 1
    empty = folder.parent / "empty"
    empty.mkdir()
    save_checkpoint(empty, {"w": torch.zeros(1)}, {})
    assert load_checkpoint(empty).tensors["w"] == 0


def test_a_link_to_a_checkpoint_stays_a_link(folder: Path) -> None:
    link = folder.parent / "elsewhere" / "best"
    link.parent.mkdir()
    link.symlink_to(folder)
    for number in range(3):
        save_checkpoint(link, {"w": torch.tensor(number)}, {})
        assert link.is_symlink()
        assert load_checkpoint(link).tensors["w"] == load_checkpoint(folder).tensors["w"] == number
    assert [path.name for path in link.parent.iterdir()] == ["best"]


def test_links_in_a_circle_are_told(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(UserError, match=r"holds no config\.json"):
        load_checkpoint(tmp_path / "a")
    with pytest.raises(OSError, match="a"):
        save_checkpoint(tmp_path / "a", {"w": torch.zeros(1)}, {})


def test_a_loaded_config_can_be_saved_with_other_weights(folder: Path) -> None:
    save_checkpoint(folder, {"w": torch.zeros(3)}, load_checkpoint(folder).config)
    tensors, config = load_checkpoint(folder)
    assert torch.equal(tensors["w"], torch.zeros(3))
    assert config["timesteps"] == 3


@pytest.mark.parametrize("config", [{"score": float("nan")}, {"policy": object()}])
def test_a_config_that_is_not_json_keeps_the_old_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"config = '{next(iter(config))}': cannot be written as JSON"):
        save_checkpoint(folder, {"w": torch.zeros(3)}, config)
    assert torch.equal(load_checkpoint(folder).tensors["w"], torch.arange(100.0))


def test_scalars_of_numpy_and_torch_are_numbers(folder: Path) -> None:
    save_checkpoint(folder, {"w": torch.zeros(3)}, {"a": torch.tensor(1.5), "b": np.float32(0.5), "c": torch.tensor(3)})
    config = load_checkpoint(folder).config
    assert (config["a"], config["b"], config["c"]) == (1.5, 0.5, 3)


def test_reading_moves_nothing_while_a_save_is_under_way(folder: Path) -> None:
    ready = folder.with_name(".T3.ready")
    save_checkpoint(ready, {"w": torch.zeros(3)}, SETTINGS)
    before = load_checkpoint(folder).tensors["w"]
    assert not torch.equal(before, torch.zeros(3))
    assert ready.is_dir()
    folder.rename(folder.with_name(".T3.old"))  # the moment between the two renames of a save
    assert torch.equal(load_checkpoint(folder).tensors["w"], torch.zeros(3))
    assert ready.is_dir()


def test_a_reader_beside_a_writer_always_finds_a_whole_checkpoint(folder: Path) -> None:
    stop = threading.Event()
    errors: list[BaseException] = []

    def write() -> None:
        value = 0.0
        while not stop.is_set():
            value += 1
            try:
                save_checkpoint(folder, {"w": torch.full((3,), value)}, SETTINGS)
            except BaseException as error:
                errors.append(error)
                return

    save_checkpoint(folder, {"w": torch.zeros(3)}, SETTINGS)
    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(150):
            weights = load_checkpoint(folder).tensors["w"]
            assert len(set(weights.tolist())) == 1
    finally:
        stop.set()
        writer.join()
    assert not errors


def test_a_checkpoint_is_found_from_inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert load_checkpoint(".").config["timesteps"] == 3


def cut(path: Path, kept: int) -> None:
    path.write_bytes(path.read_bytes()[:kept])


def grow(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(17 * 2**20)  # sparse: takes no room


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no folder": (lambda f: f.rename(f.with_name("elsewhere")), "T3", CONFIG),
    "no config": (lambda f: (f / CONFIG).unlink(), "T3", CONFIG),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), WEIGHTS, "cannot be read"),
    "weights cut": (lambda f: cut(f / WEIGHTS, 200), WEIGHTS, "truncated or altered"),
    "weights empty": (lambda f: cut(f / WEIGHTS, 0), WEIGHTS, "truncated or altered"),
    "weights longer": (lambda f: grow(f / WEIGHTS), WEIGHTS, "truncated or altered"),
    "config cut": (lambda f: cut(f / CONFIG, 30), CONFIG, "cannot be read"),
    "config empty": (lambda f: cut(f / CONFIG, 0), CONFIG, "cannot be read"),
    "config binary": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x80"), CONFIG, "cannot be read"),
    "config deep": (lambda f: (f / CONFIG).write_text("[" * 200_000), CONFIG, "cannot be read"),
    "config huge": (lambda f: grow(f / CONFIG), CONFIG, "larger"),
    "config a list": (lambda f: (f / CONFIG).write_text("[1, 2]"), CONFIG, "JSON object"),
    "config null": (lambda f: (f / CONFIG).write_text("null"), CONFIG, "JSON object"),
    "foreign": (lambda f: edit(f, format="another program"), CONFIG, "not a spiking-rl checkpoint"),
    "no format": (lambda f: (f / CONFIG).write_text("{}"), CONFIG, "not a spiking-rl checkpoint"),
    "newer": (lambda f: edit(f, format_version=2), "T3", "format version 2"),
    "no hash": (lambda f: edit(f, sha256=None), WEIGHTS, "truncated or altered"),
    "no safetensors": (lambda f: replace_weights(f, b"not safetensors"), WEIGHTS, "not a safetensors file"),
    "header too long": (lambda f: replace_weights(f, b"\xff" * 64), WEIGHTS, "not a safetensors file"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name(folder: Path, kind: str) -> None:
    damage, named, reason = DAMAGE[kind]
    damage(folder)
    with pytest.raises(UserError) as caught:
        load_checkpoint(folder)
    message = str(caught.value)
    assert caught.value.field == "checkpoint"
    assert str(folder) in message
    assert named in message
    assert reason in message
    assert "\n" not in message


def test_every_flipped_bit_is_noticed(folder: Path) -> None:
    blob = (folder / WEIGHTS).read_bytes()
    for place in range(0, len(blob), 31):
        altered = bytearray(blob)
        altered[place] ^= 1 << place % 8
        (folder / WEIGHTS).write_bytes(altered)
        with pytest.raises(UserError, match="truncated or altered"):
            load_checkpoint(folder)


class Payload:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_in_disguise_is_refused_and_not_run(folder: Path, how: str) -> None:
    mark = folder.parent / "was-here"
    if how == "pickle":
        replace_weights(folder, pickle.dumps(Payload(mark)))
    else:
        torch.save(Payload(mark), folder.parent / "blob")
        replace_weights(folder, (folder.parent / "blob").read_bytes())
    with pytest.raises(UserError, match="not a safetensors file"):
        load_checkpoint(folder)
    assert not mark.exists()


def test_loading_never_unpickles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a checkpoint was unpickled")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    assert load_checkpoint(folder).config["timesteps"] == 3


def test_json_of_another_kind_names_its_own_field(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_json(tmp_path / "results.json", "results")
    assert caught.value.field == "results"
    assert str(tmp_path / "results.json") in str(caught.value)


@pytest.mark.parametrize(
    ("hidden", "words"), [((9,), "size mismatch"), ((8, 8), "Missing key"), (None, "Missing key")], ids=str
)
def test_weights_of_another_network_are_refused_in_one_line(hidden: tuple[int, ...] | None, words: str) -> None:
    network = build_network("mlp", (4,), 2, hidden=hidden or (8,))
    tensors = build_network("mlp", (4,), 2, hidden=(8,)).state_dict() if hidden else {}
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(UserError, match=words) as caught:
        load_into(network, tensors, "runs/a/checkpoints/T3")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} was loaded"
    assert "\n" not in str(caught.value)
    assert "runs/a/checkpoints/T3" in str(caught.value)


@pytest.mark.parametrize("kind", [torch.complex64, torch.int64])
def test_so_are_numbers_of_another_kind(kind: torch.dtype) -> None:
    """Torch would cast them."""
    network = build_network("mlp", (4,), 2, hidden=(8,))
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    load_into(network, halves, "runs/a/checkpoints/T3")
    tensors["readout.weight"] = tensors["readout.weight"].to(kind)
    with pytest.raises(UserError, match=f"readout.weight is {kind}, and in the network torch.float32"):
        load_into(network, tensors, "runs/a/checkpoints/T3")
