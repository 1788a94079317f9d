"""Networks for images."""

from spiking_rl.vision.backbones import nature_cnn
from spiking_rl.vision.resnet import RESNET_BLOCKS, resnet
from spiking_rl.vision.vgg import VGG_PLANS, vgg

__all__ = ["RESNET_BLOCKS", "VGG_PLANS", "nature_cnn", "resnet", "vgg"]
