"""The spiking Mamba2 language model and what is done with it."""
