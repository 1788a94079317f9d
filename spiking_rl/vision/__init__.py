"""Networks for images."""

from spiking_rl.vision.backbones import nature_cnn

__all__ = ["nature_cnn"]
