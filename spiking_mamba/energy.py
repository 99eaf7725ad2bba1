"""Public name of :mod:`spiking_mamba.spikes.energy`."""

from spiking_mamba.spikes.energy import *  # noqa: F403
