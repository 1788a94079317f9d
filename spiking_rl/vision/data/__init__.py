"""Images for training and tests: small sets in memory, large ones streamed from disk."""

from spiking_rl.vision.data.augment import augment, batches, normalise
from spiking_rl.vision.data.datasets import DATASETS, Dataset, channel_statistics, load_dataset
from spiking_rl.vision.data.stream import IMAGENET_MEAN, IMAGENET_STD, ImageStream, StreamedDataset

__all__ = [
    "DATASETS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Dataset",
    "ImageStream",
    "StreamedDataset",
    "augment",
    "batches",
    "channel_statistics",
    "load_dataset",
    "normalise",
]
