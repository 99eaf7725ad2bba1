"""Public name of :func:`spiking_mamba.reports.spike_map.draw_spike_map`."""

from spiking_mamba.reports.spike_map import draw_spike_map

__all__ = ["draw_spike_map"]
