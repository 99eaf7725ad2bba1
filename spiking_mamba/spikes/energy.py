"""Energy of a forward pass by operation counts, in picojoules per token.

What a measured spike count, a configuration and a table of costs give: an analytic figure for ideal
hardware. ``docs/energy.md`` derives every formula and says what it leaves out; energy measured on a GPU is
:mod:`spiking_mamba.spikes.joules`, and the two are never mixed.

Five machines are compared on the same tokens. They differ in the projections and in what encodes their
inputs:

- ``dense``: multiply-accumulates (MAC) of the dense model;
- ``spiking``: ``sum |s| * out_features`` accumulations (AC), as counted;
- ``quantised``: a rival with the same 2D + 1 activation levels, int8 weights and integer MACs;
- ``quantised_sparse``: the same rival if it skips activations that are zero;
- ``shift_and_add``: the student's own integers, one addition a non-zero digit of their canonical signed-digit
  form (``7 = 8 - 1``: two) where a unary code takes ``|s|``. It needs the counts' histogram.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from spiking_mamba.model.configuration import PROJECTIONS, SpikingMambaConfig
from spiking_mamba.spikes.costs import COSTS_45NM, Costs, costs_45nm, load_costs
from spiking_mamba.spikes.counts import SpikeCounts
from spiking_mamba.spikes.operations import operations, shifts, sizes, traffic

__all__ = [
    "COSTS_45NM",
    "Costs",
    "costs_45nm",
    "energy_of_rates",
    "load_costs",
    "model_energy",
    "operations",
    "projection_energy",
]

MACHINES = ("dense", "spiking", "quantised", "quantised_sparse", "shift_and_add")
RIVALS = {"dense": "gain", **{name: f"gain_over_{name}" for name in MACHINES[2:]}}
_SCOPES = (
    *("projections", "with_neurons", "model", "multiplied"),
    *("memory", "memory_model", "decode", "decode_model", "event"),
)
_PRECISION = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def _compare(energy: dict[str, float]) -> dict[str, float | None]:
    """The machines' energies and the spiking one's gains.

    A gain is ``None`` where it takes no energy, and an energy where it is not known.
    """
    spiking = energy["spiking"]
    known = {name: None if math.isnan(value) else value for name, value in energy.items()}
    gains = {
        key: None if spiking <= 0 or math.isnan(energy[over]) else energy[over] / spiking
        for over, key in RIVALS.items()
    }
    return {f"{machine}_pj_per_token": known[machine] for machine in MACHINES} | gains


@dataclass(frozen=True)
class _Projection:
    """One projection's operations per token."""

    in_features: int
    out_features: int
    accumulations: float
    nonzero_macs: float
    levels: int
    digits: float = math.nan  # non-zero signed digits times outputs; not known without a histogram

    @property
    def macs(self) -> int:
        return self.in_features * self.out_features

    def compute(self, cost: Costs) -> dict[str, float]:
        integer = cost.mac if cost.quantised_mac is None else cost.quantised_mac
        return {
            "dense": self.macs * cost.mac,
            "spiking": self.accumulations * cost.ac,
            "quantised": self.macs * integer,
            "quantised_sparse": self.nonzero_macs * integer,
            "shift_and_add": self.digits * cost.ac,
        }

    def memory(self, cost: Costs, tokens: int) -> dict[str, float]:
        """Numbers that move: weights once a pass of ``tokens``; inputs and outputs once a token.

        Inputs written and read, outputs written. Spike counts and the rival's activations have the same
        levels and take whole bytes.
        """
        code = 2 * math.ceil(math.log2(self.levels) / 8) * self.in_features
        weights, output = self.macs / tokens, self.out_features * cost.width
        dense = (weights + 2 * self.in_features) * cost.width + output
        spiking = weights * cost.width + code + output
        rival = weights + code + output  # int8 weights
        moved = zip(MACHINES, (dense, spiking, rival, rival, spiking), strict=True)
        return {machine: bytes_ * cost.byte for machine, bytes_ in moved}

    @property
    def fetched(self) -> float:
        """Weights of the inputs that fire, all that an event-driven decoder reads for a token."""
        return self.nonzero_macs


def _event_driven(
    projections: list[_Projection], cost: Costs, spiking: float, dense: float
) -> dict[str, float | None]:
    """A token decoded by integers that are fetched where a spike asks for them.

    Of what the spiking machine takes, ``spiking``, int8 rows that fire instead of all weights; and the gain
    over ``dense``.
    """
    spared = sum(p.macs * cost.width - p.fetched for p in projections) * cost.byte
    energy = spiking - spared
    return {"pj_per_token": energy, "gain": dense / energy if energy > 0 else None}


def _add(*energies: Mapping[str, float]) -> dict[str, float]:
    return {machine: sum(energy[machine] for energy in energies) for machine in MACHINES}


def _projections(counts: SpikeCounts, config: SpikingMambaConfig) -> dict[str, _Projection]:
    """Per-token operations of every projection; checks that ``counts`` are those of such a model."""
    if not isinstance(counts, SpikeCounts) or not isinstance(config, SpikingMambaConfig):
        raise TypeError(
            "The energy is that of counts and of a model's config, in this order, got "
            f"{type(counts).__name__} and {type(config).__name__}."
        )
    wanted = sizes(config)
    rows = counts.projections
    if sorted((p.in_features, p.out_features) for p in rows.values()) != sorted(wanted):
        raise ValueError(
            f"The counts of {len(rows)} projections are not those of a spiking model of this configuration, "
            f"which has {len(wanted)}."
        )
    if config.neuron is None:
        raise ValueError("The configuration is a dense model's, which has no spikes.")
    if any(p.shifted != config.shift_inputs for p in rows.values()):
        raise ValueError(f"The counts are not those of a model with shift_inputs={config.shift_inputs}.")
    projections = {}
    for name, p in rows.items():
        if not p.tokens:
            raise ValueError(f"No token has passed {name}: count the spikes of a forward pass first.")
        if not math.isfinite(p.total):
            raise ValueError(f"The spikes of {name} are not finite: the model has diverged.")
        projections[name] = _Projection(
            p.in_features,
            p.out_features,
            p.accumulations / p.tokens,
            p.nonzero_macs / p.tokens,
            2 * p.max_spike_count + 1,
            math.nan if p.signed_digits is None else p.signed_digits * p.out_features / p.tokens,
        )
    return projections


def model_energy(
    counts: SpikeCounts,
    config: SpikingMambaConfig,
    *,
    measured_in: str = "fp32",
    costs: Mapping[str, Costs] = COSTS_45NM,
    batch: int = 1,
    length: int = 2048,
) -> dict[str, Any]:
    """Energy per token of a spiking model, of its dense twin and of its rivals, ready for JSON.

    Args:
        counts: from the forward passes whose accuracy stands beside this figure.
        config: of the model that was counted.
        measured_in: precision of those passes, "fp32", "fp16", "bf16", or the torch dtype's name. Tables
            for another precision are labelled hypothetical.
        costs: tables by name; ``COSTS_45NM | load_costs(path)`` adds a user's own, ``costs_45nm(8)`` adds
            integers in 8 bits.
        batch, length: of a prefill pass, for memory traffic. A decoding pass has ``batch`` tokens.

    Returns:
        ``hypothetical``: names of tables; ``projections``, ``projections_with_neurons`` and ``model``: for
        every table the pJ per token of the five machines and the spiking one's gains over the others, compute
        alone; ``with_memory``: the same with memory traffic, for prefill (``projections``, ``model``) and
        decoding (``decode_projections``, ``decode``; ``event_driven``: decoding the whole model by
        ``spiking_mamba.event_driven``, int8, at batch 1, and its gain over ``decode``'s dense machine);
        ``fetched``: how many weights a token's spikes ask for, their share of all, and accumulations beside
        them; ``multiplied``: the share of the spiking model's compute energy that still goes into
        multiply-accumulates, by table;
        ``layers``: one row a projection, with ``energy`` by table (compute); ``operations_per_token``: see
        :func:`operations`; ``costs``, ``pass``: what went in. A ratio below 1 means that spikes cost more; it
        is ``None`` where spikes cost nothing at all, and where the rival's energy is not known.

    Raises:
        TypeError: ``counts`` or ``config`` is something else, such as the model itself.
        ValueError: the counts are empty, not finite, or not those of ``config``'s model.
    """
    projections = _projections(counts, config)
    energy = _energy(list(projections.values()), config, measured_in, costs, batch, length)
    energy["layers"] = [
        {
            "name": name,
            "mean_abs": counts.projections[name].mean_abs,
            "nonzero_share": counts.projections[name].nonzero_share,
            "accumulations_per_token": p.accumulations,
            "dense_macs_per_token": p.macs,
            "weights_fetched_per_token": p.fetched,
            "energy": {table: _compare(p.compute(cost)) for table, cost in costs.items()},
        }
        for name, p in projections.items()
    ]
    return energy


def energy_of_rates(
    config: SpikingMambaConfig,
    mean_abs: float,
    nonzero_share: float,
    *,
    digits: float | None = None,
    max_spike_count: int | None = None,
    measured_in: str = "fp32",
    costs: Mapping[str, Costs] = COSTS_45NM,
    batch: int = 1,
    length: int = 2048,
) -> dict[str, Any]:
    """What :func:`model_energy` gives, without ``layers``, of means that were recorded.

    Energies are sums over projections, to which a mean weighted by output width is all that matters.

    Args:
        config: of the spiking model, its neuron included.
        mean_abs: mean ``|s|``, weighted by output width.
        nonzero_share: share of non-zero counts, weighted alike.
        digits: mean number of non-zero signed digits of a count, weighted alike; ``None``: not known.
        max_spike_count: D, where the configuration's neuron does not say it itself.
        measured_in, costs, batch, length: see :func:`model_energy`.

    Raises:
        ValueError: the model has no neuron.
    """
    if config.neuron is None:
        raise ValueError("A model without neurons has no spikes to be priced.")
    largest = config.max_spike_count if max_spike_count is None else max_spike_count
    levels, each = 2 * (largest or 1) + 1, math.nan if digits is None else digits
    projections = [
        _Projection(c, o, mean_abs * c * o, nonzero_share * c * o, levels, each * c * o)
        for c, o in sizes(config)
    ]
    return _energy(projections, config, measured_in, costs, batch, length)


def _energy(
    projections: list[_Projection],
    config: SpikingMambaConfig,
    measured_in: str,
    costs: Mapping[str, Costs],
    batch: int,
    length: int,
) -> dict[str, Any]:
    """What :func:`model_energy` gives, without ``layers``."""
    if batch < 1 or length < 1:
        raise ValueError(f"batch and length must be positive, got {batch} and {length}.")
    counted = operations(config)
    steps = _steps(projections, config)
    measured_in = _PRECISION.get(measured_in, measured_in)
    sections: dict[str, dict[str, Any]] = {name: {} for name in _SCOPES}
    for name, cost in costs.items():
        for scope, energies in _priced(projections, config, counted, cost, batch, length).items():
            sections[scope][name] = energies
    return {
        "measured_in": measured_in,
        "hypothetical": [name for name in costs if name != measured_in],
        "projections": sections["projections"],
        "projections_with_neurons": sections["with_neurons"],
        "model": sections["model"],
        "with_memory": {
            "projections": sections["memory"],
            "model": sections["memory_model"],
            "decode_projections": sections["decode"],
            "decode": sections["decode_model"],
            "event_driven": sections["event"],
        },
        "fetched": {
            "weights_per_token": sum(p.fetched for p in projections),
            "share": sum(p.fetched for p in projections) / sum(p.macs for p in projections),
            "accumulations_per_token": sum(p.accumulations for p in projections),
        },
        "multiplied": sections["multiplied"],
        "operations_per_token": counted | {"neurons": steps},
        "costs": {name: asdict(cost) for name, cost in costs.items()},
        "pass": {"batch": batch, "length": length},
    }


def _priced(
    projections: list[_Projection],
    config: SpikingMambaConfig,
    counted: Mapping[str, int],
    cost: Costs,
    batch: int,
    length: int,
) -> dict[str, Any]:
    """What goes into each of ``_SCOPES`` by one table of costs."""
    rest_macs = sum(n for name, n in counted.items() if name not in (*PROJECTIONS, "additions"))
    inputs = sum(p.in_features for p in projections)
    steps = _steps(projections, config)
    compute = _add(*(p.compute(cost) for p in projections))
    with_neurons = _add(compute, _encoders(inputs, steps, config, cost))
    rest = rest_macs * cost.mac + counted["additions"] * cost.ac
    model = _add(with_neurons, dict.fromkeys(MACHINES, rest))
    added = compute["spiking"] + (steps + counted["additions"]) * cost.ac
    priced: dict[str, Any] = {
        "projections": _compare(compute),
        "with_neurons": _compare(with_neurons),
        "model": _compare(model),
        "multiplied": 1 - added / model["spiking"],
    }
    for prefix, tokens in (("memory", length), ("decode", 1)):
        moved = _add(*(p.memory(cost, batch * tokens) for p in projections))
        other = {key: n * cost.width * cost.byte for key, n in traffic(config, batch, tokens).items()}
        everything = _add(model, moved, dict.fromkeys(MACHINES, other["rest"]))
        everything["spiking"] += other["neurons"]
        priced[prefix] = _compare(_add(compute, moved))
        priced[prefix + "_model"] = _compare(everything)
    if batch == 1:  # or other sequences ask for other weights; of decoding, which came last
        priced["event"] = _event_driven(projections, cost, everything["spiking"], everything["dense"])
    return priced


def _steps(projections: list[_Projection], config: SpikingMambaConfig) -> int:
    """The neurons' additions of a token: D an input, and what shifts inputs and makes up for it."""
    return sum(p.in_features * (p.levels // 2) for p in projections) + shifts(config)


def _encoders(inputs: int, steps: int, config: SpikingMambaConfig, cost: Costs) -> dict[str, float]:
    """What makes the projections' inputs, pJ a token.

    A neuron compares and subtracts once a micro-step, and leaks; the rivals scale and round, and
    shift-and-add recodes with an addition.
    """
    leak = inputs * cost.mac if config.states_per_neuron else 0.0
    rival = inputs * cost.mac
    return {
        "dense": 0.0,
        "spiking": steps * cost.ac + leak,
        "quantised": rival,
        "quantised_sparse": rival,
        "shift_and_add": rival + inputs * cost.ac,
    }


def projection_energy(counts: SpikeCounts) -> dict[str, float]:
    """How many times less energy the spiking projections take at 45 nm, by operation counts alone.

    Returns:
        ``fp32``, ``fp16``, ``int8``: dense MACs against accumulations, each at that table.
        ``with_neurons``: at fp32, against accumulations and the D additions of every neuron. ``quantised``:
        against a network with the same 2D + 1 activation levels, int8 weights and integer MACs, the int8
        table for both. ``quantised_sparse``: the same rival if it skips zero activations.
        ``shift_and_add``: against the student's own integers by signed digits; only where the counts have
        histograms. A ratio below 1 means that spikes cost more; without a spike it is infinite. ``fp16`` and
        ``int8`` are hypothetical where the accuracy was measured in another precision.
    """
    done = counts.accumulations

    def gain(macs: float, cost: Costs) -> float:
        return macs * cost.mac / (done * cost.ac) if done else math.inf

    ratios = {name: gain(counts.dense_macs, cost) for name, cost in COSTS_45NM.items()}
    fp32, with_neurons = COSTS_45NM["fp32"], done + counts.neuron_steps
    ratios["with_neurons"] = (
        counts.dense_macs * fp32.mac / (with_neurons * fp32.ac) if with_neurons else math.inf
    )
    ratios["quantised"] = ratios["int8"]
    ratios["quantised_sparse"] = gain(counts.nonzero_macs, COSTS_45NM["int8"])
    if counts.digit_accumulations is not None:
        ratios["shift_and_add"] = counts.digit_accumulations / done if done else math.inf
    return ratios
