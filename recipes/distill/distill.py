"""Distil a dense Mamba2 into a spiking one: python recipes/distill/distill.py recipes/distill/tiny.yaml"""

from spiking_mamba.commands.distill import main

if __name__ == "__main__":
    main(__doc__)
