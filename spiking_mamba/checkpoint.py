"""Public name of :mod:`spiking_mamba.model.checkpoint`."""

from spiking_mamba.model.checkpoint import *  # noqa: F403
