"""``python -m spiking_rl.scripts`` is the command ``spiking-rl``."""

from spiking_rl.scripts.main import main

main()
