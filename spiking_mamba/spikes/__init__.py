"""Counting spikes, and what they cost."""

from spiking_mamba.common.lazy import lazily

__getattr__, __dir__ = lazily(
    __name__,
    {
        "Layout": "counts",
        "ProjectionSpikes": "counts",
        "SpikeCounts": "counts",
        "count_spikes": "counting",
    },
)
