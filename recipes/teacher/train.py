"""Pretrain a small dense Mamba2: python recipes/teacher/train.py recipes/teacher/tiny.yaml"""

from spiking_mamba.commands.pretrain import main

if __name__ == "__main__":
    main(__doc__)
