"""Spiking policies in rl_zoo3: its training script, with algorithms that know our policies' names.

rl_zoo3 is not installed by this package (``pip install rl_zoo3``). Everything after the script's name is
rl_zoo3's own; the hyper-parameters are in the folder ``zoo`` of ``spiking_rl.agents``:

    python examples/rl_zoo3_plugin.py --algo dqn --env CartPole-v1 --conf-file agents/zoo/dqn.yml
"""

from rl_zoo3.train import train
from rl_zoo3.utils import ALGOS

from spiking_rl.agents import zoo

ALGOS.update(zoo.algorithms(ALGOS))

if __name__ == "__main__":
    train()
