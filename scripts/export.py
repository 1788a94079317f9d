"""spiking-rl export: an agent or a classifier in a format of others, or small enough to ship."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from spiking_rl import __version__
from spiking_rl.agents.exporting import agent_onnx
from spiking_rl.agents.loading import load_agent
from spiking_rl.checkpoint import CONFIG, load_checkpoint, save_checkpoint
from spiking_rl.errors import UserError
from spiking_rl.files import write_atomically
from spiking_rl.onnx_graph import require
from spiking_rl.runs import RunFolder
from spiking_rl.scripts.loading import Loaded, load
from spiking_rl.scripts.options import first_argument, parse
from spiking_rl.vision.exporting import classifier_onnx

DESCRIPTION = """Write an agent as a Stable-Baselines3 zip, an ONNX file, or a checkpoint of half the size.

RUN is a run folder, one of its checkpoints, or a pretrained agent; for onnx also a classifier's. The zip is for
SpikingDQN.load or SpikingPQN.load; it pickles: whoever loads one runs what is in it. The ONNX file takes raw
observations (a classifier's: uint8 images) and gives Q-values (logits); it needs pip install 'spiking-rl[export]'.

Back: SpikingDQN.load("pong.zip").save_checkpoint("agent", environment="ALE/Pong-v5").

Example: spiking-rl export pong --format onnx --output pong.onnx"""


@dataclass(kw_only=True)
class Options:
    """What to export."""

    format: Literal["sb3", "onnx", "half"] = "sb3"
    """sb3: Stable-Baselines3's zip; onnx: for ONNX Runtime and others; half: a checkpoint of 16-bit weights."""
    timesteps: int | None = None
    """T of the run; none: its lowest."""
    output: Path | None = None
    """The file or folder; none: after what is exported, as cartpole-seed0-T1.zip, .onnx, or -half."""


def run(args: list[str]) -> dict[str, Any]:
    """Export and say where the file is."""
    name, rest = first_argument(args, "run", "a run or checkpoint folder")
    options = parse(Options, "export RUN", rest, DESCRIPTION)
    assert name is not None
    if options.format == "onnx":
        return _onnx(name, options)
    agent = load_agent(name, options.timesteps, device="cpu")
    if options.format == "half":
        folder = options.output or Path(f"{_name_of(agent.checkpoint)}-half")
        if folder.exists() and not (folder / CONFIG).is_file():
            raise UserError("output", str(folder), "is there already and is no checkpoint; name another folder")
        tensors, config = load_checkpoint(agent.checkpoint)
        save_checkpoint(folder, {n: t.half() if _is_weight(n, t) else t for n, t in tensors.items()}, config)
        print(f"checkpoint: {folder}")
        return {"file": str(folder), "format": options.format, "environment": agent.trained_in}
    path = options.output or Path(f"{_name_of(agent.checkpoint)}.zip")
    if path.name and not path.suffix:
        path = path.with_name(f"{path.name}.zip")  # as Stable-Baselines3 would name it
    if path.is_dir():
        raise UserError("output", str(path), "is a folder; name a file, such as agent.zip")
    path.parent.mkdir(parents=True, exist_ok=True)
    blob = io.BytesIO()
    agent.model.save(blob)
    write_atomically(path, blob.getvalue())
    loader = type(agent.model).__name__
    print(f"zip: {path} (load with {loader}.load)")
    return {"file": str(path), "format": options.format, "environment": agent.trained_in, "class": loader}


def _name_of(checkpoint: Path) -> str:
    """Return what an exported checkpoint is called: the run and its T, or the agent's own name."""
    path = checkpoint.resolve()
    if path.parent.name != "checkpoints":
        return path.name
    return f"{RunFolder(path.parent.parent).name.replace('/', '-')}-{path.name}"


def _is_weight(name: str, tensor: Tensor) -> bool:
    """Tell the large tensors from thresholds, leaks and statistics, which keep their precision."""
    return tensor.dim() > 1 and ".neurons." not in name


def _onnx(name: str, options: Options) -> dict[str, Any]:
    onnx = require("onnx")
    if options.output is not None and options.output.suffix != ".onnx":
        raise UserError("output", str(options.output), "must end with .onnx")
    loaded = load(name, options.timesteps)
    about = _about(loaded)
    path = options.output or Path(f"{_name_of(loaded.checkpoint)}.onnx")
    if loaded.agent is not None:
        blob = agent_onnx(loaded.agent, about)
    else:
        assert loaded.images is not None
        blob = classifier_onnx(loaded.network, loaded.images, about)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, blob)
    graph = onnx.load_model_from_string(blob).graph
    inputs, outputs = ([value.name for value in values] for values in (graph.input, graph.output))
    print(f"onnx: {path} ({', '.join(inputs)} -> {', '.join(outputs)})")
    facts = {"environment": about.get("environment"), "timesteps": loaded.config.get("timesteps")}
    return {"file": str(path), "format": options.format, **facts, "inputs": inputs, "outputs": outputs}


def _about(loaded: Loaded) -> dict[str, str]:
    """Return what is stored with an ONNX model."""
    facts = {"spiking_rl": __version__, "sha256": loaded.config["sha256"], "timesteps": loaded.config.get("timesteps")}
    if loaded.images is not None:
        facts["classes"] = json.dumps(loaded.images.classes)
    else:
        facts["environment"] = loaded.config.get("environment")
    return {key: str(value) for key, value in facts.items() if value is not None}
