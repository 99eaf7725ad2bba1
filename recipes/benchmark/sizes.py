"""A small model of the sizes that a benchmark's command line gives."""

import argparse

from spiking_mamba import SpikingMambaConfig

__all__ = ["add_sizes", "config_of_sizes"]

SIZES = {"hidden_size": 256, "head_dim": 32, "state_size": 64, "layers": 10, "vocab_size": 4096}


def add_sizes(parser: argparse.ArgumentParser, **others: int) -> None:
    """An option for each of a model's sizes, and others, all whole numbers, with what they are by default."""
    for name, default in (SIZES | {"chunk_size": 64} | others).items():
        parser.add_argument(f"--{name}", type=int, default=default)


def config_of_sizes(args: argparse.Namespace) -> SpikingMambaConfig:
    return SpikingMambaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        num_heads=2 * args.hidden_size // args.head_dim,
        head_dim=args.head_dim,
        n_groups=1,
        state_size=args.state_size,
        chunk_size=args.chunk_size,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
