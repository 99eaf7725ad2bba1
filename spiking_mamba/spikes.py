"""Counting spikes in the forward passes that a model makes anyway."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .modeling import SpikingMambaForCausalLM
from .projection import SpikingProjection

__all__ = ["ProjectionSpikes", "SpikeCounts", "count_spikes"]


@dataclass
class ProjectionSpikes:
    """What one projection's neuron has emitted; sums are float64 and leave out padding.

    Attributes:
        in_features, out_features: of the projection.
        max_spike_count: ``D``.
        tokens: how many tokens were seen.
        channel_sum: ``sum |s|`` of every input channel, ``[in_features]``.
        nonzero: how many spike counts were not zero.
        histogram: how often each count of ``-D .. D`` came, ``[2D + 1]``.
    """

    in_features: int
    out_features: int
    max_spike_count: int
    tokens: int = 0
    channel_sum: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    nonzero: int = 0
    histogram: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    def add(self, spike: torch.Tensor) -> None:
        """Count ``spike`` of shape ``[tokens, in_features]``."""
        bins = 2 * self.max_spike_count + 1
        if self.tokens == 0:
            self.channel_sum = torch.zeros(self.in_features, dtype=torch.float64, device=spike.device)
            self.histogram = torch.zeros(bins, dtype=torch.int64, device=spike.device)
        self.tokens += spike.shape[0]
        self.channel_sum += spike.abs().sum(0, dtype=torch.float64)
        level = spike.float().round().long().clamp_(-self.max_spike_count, self.max_spike_count)
        self.histogram += torch.bincount((level + self.max_spike_count).flatten(), minlength=bins)
        self.nonzero += int(torch.count_nonzero(spike))

    @property
    def total(self) -> float:
        """``sum |s|``."""
        return float(self.channel_sum.sum())

    @property
    def mean_abs(self) -> float:
        """Mean ``|s|`` over tokens and channels."""
        return self.total / max(1, self.tokens * self.in_features)

    @property
    def nonzero_share(self) -> float:
        return self.nonzero / max(1, self.tokens * self.in_features)

    @property
    def silent_channels(self) -> int:
        """Input channels that never spiked."""
        return int((self.channel_sum == 0).sum())

    @property
    def accumulations(self) -> float:
        """``sum |s| * out_features``: what spike-driven inference adds up."""
        return self.total * self.out_features

    @property
    def dense_macs(self) -> float:
        """Multiply-accumulates of the dense projection on the same tokens."""
        return float(self.tokens) * self.in_features * self.out_features

    @property
    def nonzero_macs(self) -> float:
        """Multiply-accumulates of a quantised projection that skips zeros."""
        return float(self.nonzero) * self.out_features


@dataclass
class SpikeCounts:
    """The spikes of all projections by module name."""

    projections: dict[str, ProjectionSpikes]

    def _sum(self, attribute: str) -> float:
        return sum(getattr(p, attribute) for p in self.projections.values())

    @property
    def accumulations(self) -> float:
        return self._sum("accumulations")

    @property
    def dense_macs(self) -> float:
        return self._sum("dense_macs")

    @property
    def nonzero_macs(self) -> float:
        return self._sum("nonzero_macs")

    @property
    def mean_abs(self) -> float:
        """Mean ``|s|`` weighted by output width, so that 4.6 / (0.9 * mean_abs) is the fp32 energy gain."""
        return self.accumulations / max(1.0, self.dense_macs)

    @property
    def nonzero_share(self) -> float:
        """Share of non-zero counts, weighted by output width."""
        return self.nonzero_macs / max(1.0, self.dense_macs)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        rows = {
            name: {
                "mean_abs": p.mean_abs,
                "nonzero_share": p.nonzero_share,
                "silent_channels": p.silent_channels,
                "tokens": p.tokens,
                "accumulations": p.accumulations,
                "dense_macs": p.dense_macs,
                "histogram": p.histogram.tolist(),
            }
            for name, p in self.projections.items()
        }
        return {"mean_abs": self.mean_abs, "nonzero_share": self.nonzero_share, "projections": rows}


def _by_batch(projection: SpikingProjection, spike: torch.Tensor) -> torch.Tensor:
    """A node's output as ``[B, L, C]``: it is ``[1, B, L, C]`` or ``[L, B, C]``."""
    return spike[0] if projection.membrane == "token" else spike.transpose(0, 1)


@contextmanager
def count_spikes(model: SpikingMambaForCausalLM) -> Iterator[SpikeCounts]:
    """Count the spikes of every forward pass inside the ``with`` block.

    Padding (``attention_mask == 0``) is left out. What gradient checkpointing computes again in the
    backward pass is not counted again. One context at a time a model is enough; contexts may nest.
    """
    projections = model.projections()
    counts = SpikeCounts(
        {
            name: ProjectionSpikes(p.in_features, p.out_features, p.max_spike_count)
            for name, p in projections.items()
        }
    )
    mask: list[torch.Tensor | None] = [None]

    def note_mask(module, args, kwargs) -> None:
        mask[0] = kwargs.get("attention_mask")

    def counter(projection: SpikingProjection, spikes: ProjectionSpikes):
        def count(node, args, output) -> None:
            if torch._C._current_graph_task_id() != -1:  # recomputed by gradient checkpointing
                return
            # detached at once: what this saved for a backward pass, the recomputation would not
            spike = _by_batch(projection, output.detach())
            if mask[0] is None or mask[0].shape[1] < spike.shape[1]:
                spikes.add(spike.flatten(0, 1))
            else:  # a cache's mask covers the past too
                spikes.add(spike[mask[0][:, -spike.shape[1] :].bool()])

        return count

    hooks = [model.backbone.register_forward_pre_hook(note_mask, with_kwargs=True)]
    for name, projection in projections.items():
        assert projection.neuron is not None
        hooks.append(projection.neuron.register_forward_hook(counter(projection, counts.projections[name])))
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()
