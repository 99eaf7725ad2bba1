"""Public name of :mod:`spiking_mamba.reports.spike_map`."""

from spiking_mamba.reports.spike_map import *  # noqa: F403
