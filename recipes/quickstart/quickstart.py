"""Distil a spiking student from the dense teacher beside this file, and measure both.

python recipes/quickstart/quickstart.py recipes/quickstart/quickstart.yaml
"""

from spiking_mamba.commands.quickstart import main

if __name__ == "__main__":
    main(__doc__)
