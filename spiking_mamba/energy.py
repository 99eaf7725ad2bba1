"""Energy of the projections by operation counts.

Costs of one operation in picojoules at 45 nm (Horowitz, ISSCC 2014): a multiply-accumulate (MAC) of the
dense projection against an accumulation (AC) of the spiking one. Idealised: compute only, no memory
traffic, no control; whole-model figures and traffic are not part of this module yet.
"""

from dataclasses import dataclass

from .spikes import SpikeCounts

__all__ = ["COSTS_45NM", "Costs", "projection_energy"]


@dataclass(frozen=True)
class Costs:
    """Energy per operation in pJ."""

    mac: float
    ac: float


COSTS_45NM = {
    "fp32": Costs(mac=4.6, ac=0.9),
    "fp16": Costs(mac=1.5, ac=0.4),
    "int8": Costs(mac=0.23, ac=0.03),
}


def projection_energy(counts: SpikeCounts) -> dict[str, float]:
    """How many times less energy the spiking projections take, by operation counts.

    Returns:
        ``fp32``, ``fp16``, ``int8``: dense MACs against accumulations, each at that table. ``quantised``:
        against a network with the same 2D + 1 activation levels, int8 weights and integer MACs, the int8
        table for both. ``quantised_sparse``: the same rival if it skips zero activations. A ratio below 1
        means that spikes cost more. ``fp16`` and ``int8`` are hypothetical where the accuracy was measured
        in another precision.
    """
    ratios = {
        name: counts.dense_macs * cost.mac / (counts.accumulations * cost.ac)
        if counts.accumulations
        else float("inf")
        for name, cost in COSTS_45NM.items()
    }
    ratios["quantised"] = ratios["int8"]
    share = counts.nonzero_macs / counts.dense_macs if counts.dense_macs else 0.0
    ratios["quantised_sparse"] = ratios["int8"] * share if counts.accumulations else float("inf")
    return ratios
