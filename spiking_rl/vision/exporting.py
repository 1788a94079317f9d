"""A classifier as an ONNX model, the standardisation of its images included."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from spiking_rl.networks import LayeredNetwork
from spiking_rl.onnx_model import Observation, onnx_model
from spiking_rl.vision.building import ImageFacts


def classifier_onnx(network: LayeredNetwork, images: ImageFacts, about: Mapping[str, str] | None = None) -> bytes:
    """Return a classifier as an ONNX model from ``image``, uint8 ``(B, C, H, W)``, to ``logits``.

    Args:
        network: at any T, or ReLU.
        images: what it was trained on.
        about: facts to store with the model.

    Raises:
        UserError: onnx is not installed, or the network has a part or a code that cannot be exported.
    """
    # Rounded as spiking_rl.vision.data.normalise rounds them.
    scale = np.array([1 / (255 * s) for s in images.std], np.float32)
    shift = np.array([-m / s for m, s in zip(images.mean, images.std, strict=True)], np.float32)
    scaling = [("Mul", scale[:, None, None]), ("Add", shift[:, None, None])]
    return onnx_model(
        network, Observation(images.input_shape, np.uint8, scaling, "image"), output="logits", about=about
    )
