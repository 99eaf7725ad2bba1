"""Public name of :mod:`spiking_mamba.spikes.joules`."""

from spiking_mamba.spikes.joules import *  # noqa: F403
