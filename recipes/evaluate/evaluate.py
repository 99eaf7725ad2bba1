"""Evaluate checkpoints: zero-shot tasks, perplexity, and the spikes and energy of those forward passes.

python recipes/evaluate/evaluate.py recipes/evaluate/evaluate.yaml models=runs/quickstart/student/model
"""

from spiking_mamba.commands.evaluate import main

if __name__ == "__main__":
    main(__doc__)
