"""Counting spikes, and what they cost."""

from spiking_mamba.common.lazy import lazily

__getattr__, __dir__ = lazily(
    __name__,
    {
        "Layout": "counting",
        "ProjectionSpikes": "counting",
        "SpikeCounts": "counting",
        "count_spikes": "counting",
    },
)
