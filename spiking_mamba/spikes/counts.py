"""How often projections have spiked: exact sums, on the device where the spikes were.

Spikes are small integers in the model's dtype; each call is summed in float32 pieces that stay below 2^24, up
to which float32 holds every integer, and the pieces in float64 (exact to 2^53). A sum in bfloat16 would stop
growing at 256, and one straight to float64 makes torch write a float64 copy of the spikes first.
"""

import functools
import importlib
import importlib.util
import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    import pandas

__all__ = ["Layout", "ProjectionSpikes", "SpikeCounts"]

EXACT = 1 << 24  # float32 holds every integer up to here


_SUMS = ("channel_sum", "channel_nonzero", "position_sum", "position_tokens", "_levels")


@functools.cache
def _kernel() -> ModuleType | None:
    """The GPU's way to count, where Triton is installed, as it is with torch for CUDA on Linux."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(".kernel", __package__)


def _finite(value: float) -> float | None:
    """JSON knows neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def _padded(sums: torch.Tensor, size: int) -> torch.Tensor:
    return nn.functional.pad(sums, (0, size - sums.shape[0]))


class Layout(NamedTuple):
    """Where the tokens of a padded batch are.

    Attributes:
        padding: bool ``[B, L]``, true where there is no token.
        position: int64 ``[B, L]``, how many tokens stand before this one in its row.
        tokens: float64 ``[P]``, how many tokens of the batch stand at every position.
    """

    padding: torch.Tensor
    position: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def of(cls, mask: torch.Tensor, length: int) -> "Layout":
        """The last ``length`` tokens of ``mask`` ``[B, >= L]``, which covers a cache's past too.

        As the blocks see them: before their padding.
        """
        before, here = mask[:, :-length].bool().sum(1), mask[:, -length:].bool().sum(1)
        step = torch.arange(length, device=mask.device)
        real = step < here[:, None]
        position = (before[:, None] + step).clamp(max=mask.shape[1] - 1)
        tokens = torch.zeros(mask.shape[1], dtype=torch.float64, device=mask.device)
        tokens.index_add_(0, position.flatten(), real.double().flatten())
        return cls((~real).contiguous(), position, tokens)


@dataclass(eq=False)
class ProjectionSpikes:
    """What one projection's neuron has emitted; sums are float64, exact, and leave out padding.

    Attributes:
        in_features, out_features: of the projection.
        max_spike_count: ``D``.
        count_levels: whether to keep a histogram.
        shifted: whether the projection's inputs are shifted.
        channel_sum: ``sum |s|`` of every input channel, ``[in_features]``.
        channel_nonzero: how many spike counts of every channel were not zero, ``[in_features]``.
        position_sum: ``sum |s|`` over batch and channels at every position, ``[P]``.
        position_tokens: how many tokens were seen at every position, ``[P]``.
    """

    in_features: int
    out_features: int
    max_spike_count: int
    count_levels: bool = True
    shifted: bool = False
    channel_sum: torch.Tensor = field(init=False, repr=False)
    channel_nonzero: torch.Tensor = field(init=False, repr=False)
    position_sum: torch.Tensor = field(init=False, repr=False)
    position_tokens: torch.Tensor = field(init=False, repr=False)
    _levels: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        channels, levels = self.in_features, 2 * self.max_spike_count + 1
        for name, size in zip(_SUMS, (channels, channels, 0, 0, levels), strict=True):
            setattr(self, name, torch.zeros(size, dtype=torch.float64))

    def add(self, spike: torch.Tensor, layout: Layout | None = None) -> None:
        """Count spikes ``[B, L, in_features]``, without waiting for the device.

        Args:
            spike: of any float dtype.
            layout: where the tokens are; ``None``: there is no padding and positions run from 0 to L - 1.
        """
        batch, length, _ = spike.shape
        self._make_room(spike.device, length if layout is None else layout.tokens.shape[0])
        if spike.is_cuda and (kernel := _kernel()) is not None:
            padding, position = (None, None) if layout is None else (layout.padding, layout.position)
            sums = tuple(getattr(self, name) for name in _SUMS)
            # the context costs about as much as the launch
            here = spike.device.index == torch.cuda.current_device()
            with nullcontext() if here else torch.cuda.device(spike.device):
                kernel.accumulate(spike, padding, position, sums, self.max_spike_count, self.count_levels)
            return
        size = spike.abs()
        if layout is not None:
            size.masked_fill_(layout.padding.unsqueeze(-1), 0)
        per_token = size.sum(-1, dtype=torch.float32)  # [B, L]
        if layout is None:
            self.position_sum[:length] += per_token.sum(0, dtype=torch.float64)
            self.position_tokens[:length] += batch
        else:
            self.position_sum.index_add_(0, layout.position.flatten(), per_token.double().flatten())
            self.position_tokens[: layout.tokens.shape[0]] += layout.tokens
        for piece in size.flatten(0, 1).split(max(1, EXACT // self.max_spike_count)):  # [tokens, channels]
            self.channel_sum += piece.sum(0, dtype=torch.float32)
            self.channel_nonzero += piece.clamp_(max=1).sum(0, dtype=torch.float32)
        if self.count_levels:  # torch.bincount would make the host wait
            edge = self.max_spike_count + 0.5
            if layout is not None:
                spike = spike.masked_fill(layout.padding.unsqueeze(-1), 0)
            for values in spike.flatten().split(EXACT):
                self._levels += torch.histc(values.float(), self._levels.shape[0], -edge, edge)

    def _make_room(self, device: torch.device, positions: int) -> None:
        room = self.position_sum.shape[0]
        if self.channel_sum.device == device and positions <= room:
            return
        with torch.inference_mode(False):  # or a later call outside inference mode could not add to them
            if self.channel_sum.device != device:
                self.to(device)
            if positions > room:
                for name in ("position_sum", "position_tokens"):  # by half more: decoding grows by one
                    setattr(self, name, _padded(getattr(self, name), positions + room // 2))

    def to(self, device: torch.device | str) -> None:
        """Move the sums."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name).to(device))

    def __add__(self, other: "ProjectionSpikes") -> "ProjectionSpikes":
        shape = (self.in_features, self.out_features, self.max_spike_count)
        if shape != (other.in_features, other.out_features, other.max_spike_count):
            raise ValueError("Only the spikes of the same projection can be added.")
        levels = self.count_levels and other.count_levels
        both = ProjectionSpikes(*shape, count_levels=levels, shifted=self.shifted or other.shifted)
        for name in _SUMS:
            one, two = getattr(self, name).cpu(), getattr(other, name).cpu()
            size = max(one.shape[0], two.shape[0])
            setattr(both, name, _padded(one, size) + _padded(two, size))
        return both

    @property
    def tokens(self) -> int:
        """How many tokens were seen."""
        return int(self.position_tokens.sum())

    @property
    def total(self) -> float:
        """``sum |s|``."""
        return float(self.channel_sum.sum())

    @property
    def nonzero(self) -> int:
        """How many spike counts were not zero."""
        return int(self.channel_nonzero.nan_to_num().sum())

    @property
    def histogram(self) -> torch.Tensor | None:
        """How often each count of ``-D .. D`` came, int64 ``[2D + 1]``.

        ``None`` if it was not asked for, or if a count was not finite.
        """
        if not self.count_levels or not math.isfinite(self.total):
            return None
        histogram = self._levels.long()
        histogram[self.max_spike_count] = 0  # it has padding in it: zeros are what the others are not
        histogram[self.max_spike_count] = self.tokens * self.in_features - int(histogram.sum())
        return histogram

    @property
    def signed_digits(self) -> int | None:
        """Non-zero digits of all counts in canonical signed-digit form; ``None`` without a histogram.

        Of all codes in -1, 0 and 1 times powers of two the one with fewest.
        """
        histogram = self.histogram
        if histogram is None:
            return None
        size = torch.arange(-self.max_spike_count, self.max_spike_count + 1).abs().tolist()
        # n and 3n differ in as many bits as the form of n has digits
        return sum(
            number * (n ^ 3 * n).bit_count() for n, number in zip(size, histogram.tolist(), strict=True)
        )

    @property
    def mean_abs(self) -> float:
        """Mean ``|s|`` over tokens and channels."""
        return self.total / max(1, self.tokens * self.in_features)

    @property
    def nonzero_share(self) -> float:
        """Share of the counts that are not zero; NaN if one was not finite."""
        found = self.nonzero / max(1, self.tokens * self.in_features)
        return found if math.isfinite(self.total) else math.nan

    @property
    def per_token(self) -> float:
        """``sum |s|`` of a token, over the channels."""
        return self.total / max(1, self.tokens)

    @property
    def silent_channels(self) -> int:
        """Input channels that never spiked."""
        return int((self.channel_sum == 0).sum())

    @property
    def channel_mean_abs(self) -> torch.Tensor:
        """Mean ``|s|`` of every channel, float64 ``[in_features]``."""
        return self.channel_sum / max(1, self.tokens)

    @property
    def position_mean_abs(self) -> torch.Tensor:
        """Mean ``|s|`` over batch and channels at every position, float64 ``[positions seen]``.

        NaN at a position that was skipped.
        """
        seen = int(self.position_tokens.nonzero().max()) + 1 if self.tokens else 0
        return self.position_sum[:seen] / (self.position_tokens[:seen] * self.in_features)

    @property
    def accumulations(self) -> float:
        """``sum |s| * out_features``: what spike-driven inference adds up."""
        return self.total * self.out_features

    @property
    def dense_macs(self) -> float:
        """Multiply-accumulates of the dense projection on the same tokens."""
        return float(self.tokens) * self.in_features * self.out_features

    @property
    def neuron_steps(self) -> float:
        """Additions of the neuron, see :attr:`SpikeCounts.neuron_steps`."""
        shifts = self.in_features + self.out_features if self.shifted else 0
        return float(self.tokens) * (self.in_features * self.max_spike_count + shifts)

    @property
    def nonzero_macs(self) -> float:
        """Multiply-accumulates of a quantised projection that skips zeros; NaN if a count was not finite."""
        return float(self.nonzero) * self.out_features if math.isfinite(self.total) else math.nan

    def to_dict(self, detail: bool = False) -> dict[str, Any]:
        """Plain data for JSON; ``detail`` adds the means by channel and by position."""
        histogram = self.histogram
        row = {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "mean_abs": _finite(self.mean_abs),
            "nonzero_share": _finite(self.nonzero_share),
            "per_token": _finite(self.per_token),
            "silent_channels": self.silent_channels,
            "tokens": self.tokens,
            "accumulations": _finite(self.accumulations),
            "dense_macs": self.dense_macs,
            "histogram": None if histogram is None else histogram.tolist(),
        }
        if detail:
            row["channels"] = [_finite(value) for value in self.channel_mean_abs.tolist()]
            row["positions"] = [_finite(value) for value in self.position_mean_abs.tolist()]
        return row


@dataclass
class SpikeCounts:
    """The spikes of all projections by module name. Counts of one model add up: ``sum(counts_by_task)``."""

    projections: dict[str, ProjectionSpikes]

    def __add__(self, other: "SpikeCounts") -> "SpikeCounts":
        if self.projections.keys() != other.projections.keys():
            raise ValueError("Only counts of the same model can be added.")
        return SpikeCounts({name: p + other.projections[name] for name, p in self.projections.items()})

    def __radd__(self, other: Any) -> "SpikeCounts":
        return self if other == 0 else NotImplemented  # where sum() starts

    def _sum(self, attribute: str) -> float:
        return sum(getattr(p, attribute) for p in self.projections.values())

    @property
    def tokens(self) -> int:
        """Tokens seen, by the projection that saw most."""
        return max((p.tokens for p in self.projections.values()), default=0)

    @property
    def accumulations(self) -> float:
        """Those of all projections, ``sum |s| * out_features`` over the tokens seen."""
        return self._sum("accumulations")

    @property
    def dense_macs(self) -> float:
        """Multiply-accumulations of the dense products for these tokens."""
        return self._sum("dense_macs")

    @property
    def nonzero_macs(self) -> float:
        """Of :attr:`dense_macs` those of inputs whose count is not zero."""
        return self._sum("nonzero_macs")

    @property
    def neuron_steps(self) -> float:
        """Additions of the neurons, D an input: a comparison and a subtraction a micro-step.

        Where inputs are shifted, one more an input, and one an output.
        """
        return float(sum(p.neuron_steps for p in self.projections.values()))

    @property
    def digit_accumulations(self) -> float | None:
        """Accumulations of shift-and-add: signed digits times outputs; ``None`` without histograms."""
        rows = self.projections.values()
        products = [None if (n := p.signed_digits) is None else float(n) * p.out_features for p in rows]
        return None if not products or None in products else math.fsum(n for n in products if n is not None)

    @property
    def mean_abs(self) -> float:
        """Mean ``|s|`` weighted by output width, so that 4.6 / (0.9 * mean_abs) is the fp32 energy gain."""
        return self.accumulations / max(1.0, self.dense_macs)

    @property
    def nonzero_share(self) -> float:
        """Share of non-zero counts, weighted by output width."""
        return self.nonzero_macs / max(1.0, self.dense_macs)

    @property
    def position_mean_abs(self) -> torch.Tensor:
        """Mean ``|s|`` at every position, weighted by output width like :attr:`mean_abs`; float64 ``[P]``."""
        rows = list(self.projections.values())
        seen = max((p.position_mean_abs.shape[0] for p in rows), default=0)
        done, dense = torch.zeros(2, seen, dtype=torch.float64)
        for p in rows:
            sums, tokens = (_padded(s.cpu()[:seen], seen) for s in (p.position_sum, p.position_tokens))
            done += sums * p.out_features
            dense += tokens * (p.in_features * p.out_features)
        return done / dense

    def to_dict(self, detail: bool = False) -> dict[str, Any]:
        """Plain data for JSON; ``detail`` adds every projection's means by channel and by position."""
        return {
            "mean_abs": _finite(self.mean_abs),
            "nonzero_share": _finite(self.nonzero_share),
            "silent_channels": int(self._sum("silent_channels")),
            "tokens": self.tokens,
            "accumulations": _finite(self.accumulations),
            "dense_macs": self.dense_macs,
            "positions": [_finite(value) for value in self.position_mean_abs.tolist()],
            "projections": {name: p.to_dict(detail) for name, p in self.projections.items()},
        }

    def to_frame(self) -> "pandas.DataFrame":
        """One row a projection, indexed by its name, and a row ``total``; without histograms."""
        import pandas

        everything = self.to_dict()
        rows = everything["projections"] | {
            "total": {key: value for key, value in everything.items() if key != "projections"}
        }
        frame = pandas.DataFrame.from_dict(rows, orient="index")
        return frame.drop(columns=["histogram", "positions"], errors="ignore")
