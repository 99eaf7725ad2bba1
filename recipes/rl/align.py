"""Optimise a model on preferences by DPO or KTO: python recipes/rl/align.py recipes/rl/dpo.yaml"""

from spiking_mamba.commands.align import main

if __name__ == "__main__":
    main(__doc__)
