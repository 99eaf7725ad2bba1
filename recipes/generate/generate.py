"""Write on from a prompt, token by token, by event-driven integers on this processor.

python recipes/generate/generate.py recipes/generate/generate.yaml prompt="The city lies on"
"""

from spiking_mamba.commands.generate import main

if __name__ == "__main__":
    main(__doc__)
