"""spiking-rl: reinforcement-learning agents made of spiking neurons, pruned to one timestep.

This package is the core: neurons, networks, calibration, temporal pruning, checkpoints, energy. It
knows no environment and no agent; those are ``spiking_rl.envs`` and ``spiking_rl.agents``.
"""

from spiking_rl import mlp, vision  # noqa: F401  they register networks
from spiking_rl.allocator import keep_memory
from spiking_rl.balancing import balance_thresholds, convert_balanced
from spiking_rl.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from spiking_rl.conversion import calibrate_thresholds, convert, take_weights
from spiking_rl.energy import (
    FLOAT32,
    INT32,
    Arithmetic,
    SpikeCounter,
    energy_ratio,
    macs_per_layer,
    measured_energy,
    membrane_traffic,
    normalisation_macs,
    spikes_per_input,
)
from spiking_rl.errors import UserError
from spiking_rl.folding import fold_batch_norm
from spiking_rl.lowering import lower_timesteps
from spiking_rl.networks import LayeredNetwork
from spiking_rl.neurons import LIF, LIFScan, LIFState, clamp_after_step, lif_scan, lif_scan_reference
from spiking_rl.pruning import Done, Next, Stay, TemporalPruning
from spiking_rl.rates import firing_rate
from spiking_rl.registry import NETWORKS, build_network, register_network
from spiking_rl.surrogate import fire

__version__ = "0.1.0"

__all__ = [
    "FLOAT32",
    "INT32",
    "LIF",
    "NETWORKS",
    "Arithmetic",
    "Checkpoint",
    "Done",
    "LIFScan",
    "LIFState",
    "LayeredNetwork",
    "Next",
    "SpikeCounter",
    "Stay",
    "TemporalPruning",
    "UserError",
    "balance_thresholds",
    "build_network",
    "calibrate_thresholds",
    "clamp_after_step",
    "convert",
    "convert_balanced",
    "energy_ratio",
    "fire",
    "firing_rate",
    "fold_batch_norm",
    "keep_memory",
    "lif_scan",
    "lif_scan_reference",
    "load_checkpoint",
    "lower_timesteps",
    "macs_per_layer",
    "measured_energy",
    "membrane_traffic",
    "normalisation_macs",
    "register_network",
    "save_checkpoint",
    "spikes_per_input",
    "take_weights",
    "vision",
]
