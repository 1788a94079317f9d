"""An agent as an ONNX model, the scaling of its observations included."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.preprocessing import is_image_space

from spiking_rl.agents.dqn import SpikingDQN
from spiking_rl.agents.policies import SpikingQNetwork, sees_scaled
from spiking_rl.agents.pqn import SpikingPQN
from spiking_rl.errors import UserError
from spiking_rl.onnx_model import Observation, onnx_model


def agent_onnx(model: SpikingPQN | SpikingDQN, about: Mapping[str, str] | None = None) -> bytes:
    """Return a trained agent as an ONNX model from raw ``observation`` to ``q_values``.

    A stateful agent's model also takes its membranes and ``episode_start``, and gives the membranes after the
    decision; see :func:`spiking_rl.onnx_model.onnx_model`.

    Args:
        model: the agent, at any T.
        about: facts to store with it.

    Raises:
        UserError: onnx is not installed, or the agent has a code or an observation that cannot be exported, or
            learned behind VecNormalize.
    """
    if sees_scaled(model):
        remedy = (
            "learned behind VecNormalize, whose scaling the file would lack; learn without it: agents scale themselves"
        )
        raise UserError("model", type(model).__name__, remedy)
    q_net = model.policy.q_net
    return onnx_model(q_net.network, raw_observation(q_net), stateful=q_net.stateful, about=about)


def raw_observation(q_net: SpikingQNetwork) -> Observation:
    """Return how :meth:`SpikingQNetwork.features` scales observations, as operators.

    Raises:
        UserError: the observations are no Box.
    """
    space = q_net.observation_space
    if not isinstance(space, spaces.Box):
        raise UserError("observation_space", str(space), "only agents that observe a Box can be exported to ONNX")
    scaling: list[tuple[str, float | NDArray[np.float32]]] = []
    if q_net.normalize_images and is_image_space(space):
        scaling.append(("Div", 255.0))
    norm = q_net.norm
    if norm is not None:
        factor = torch.rsqrt(norm.running_var + 1e-8)
        scaling += [("Sub", norm.running_mean.cpu().numpy()), ("Mul", factor.cpu().numpy())]
        scaling += [("Max", -norm.clip), ("Min", norm.clip)]
    return Observation(space.shape, space.dtype, scaling)
