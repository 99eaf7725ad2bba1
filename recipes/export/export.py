"""Write a checkpoint in a form that another program reads.

python recipes/export/export.py recipes/export/export.yaml model=state-spaces/mamba2-130m output=runs/130m
"""

from spiking_mamba.commands.export import main

if __name__ == "__main__":
    main(__doc__)
