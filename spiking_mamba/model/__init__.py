"""Tensors in, logits out: the spiking Mamba2, its checkpoints and its decoding."""
