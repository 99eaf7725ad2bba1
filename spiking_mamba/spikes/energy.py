"""Energy of a forward pass by operation counts, in picojoules per token.

What a measured spike count, a configuration and a table of costs give: an analytic figure for ideal
hardware. ``docs/energy.md`` derives every formula and says what it leaves out; energy measured on a GPU is
:mod:`spiking_mamba.spikes.joules`, and the two are never mixed.

Four machines are compared on the same tokens. They differ in the projections alone:

- ``dense``: multiply-accumulates (MAC) of the dense model;
- ``spiking``: ``sum |s| * out_features`` accumulations (AC), as counted;
- ``quantised``: a rival with the same 2D + 1 activation levels, int8 weights and integer MACs;
- ``quantised_sparse``: the same rival if it skips activations that are zero.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from spiking_mamba.common.keys import reject_unknown_keys
from spiking_mamba.common.yaml_text import load_yaml
from spiking_mamba.model.configuration import PROJECTIONS, SpikingMambaConfig
from spiking_mamba.spikes.counts import SpikeCounts

__all__ = ["COSTS_45NM", "Costs", "load_costs", "model_energy", "operations", "projection_energy"]

MACHINES = ("dense", "spiking", "quantised", "quantised_sparse")
_PRECISION = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Costs:
    """Energy per operation in pJ.

    Attributes:
        mac, ac: of a multiply-accumulate and of an accumulation.
        byte: of one byte read from or written to memory. 24.96 is spikingjelly 2.0.0's
            (``op_counter.SimpleEnergyCostConfig``), 8 times the 3.12 pJ per bit of STEP.
        width: bytes of a number.
        quantised_mac: of the quantised rival's integer multiply-accumulate; ``None``: ``mac``.
    """

    mac: float
    ac: float
    byte: float = 24.96
    width: float = 4.0
    quantised_mac: float | None = None


# Horowitz, "Computing's energy problem", ISSCC 2014, figure 1.1.9: an addition, and a multiplication with it
COSTS_45NM = {
    "fp32": Costs(mac=4.6, ac=0.9, width=4.0, quantised_mac=0.23),
    "fp16": Costs(mac=1.5, ac=0.4, width=2.0, quantised_mac=0.23),
    "int8": Costs(mac=0.23, ac=0.03, width=1.0),
}


def load_costs(path: str | Path) -> dict[str, Costs]:
    """Read tables of costs from a YAML file, ``name: {mac: pJ, ac: pJ}`` and :class:`Costs`' other fields.

    Raises:
        ValueError: names the file, the table and the key that is missing, unknown, or no positive number.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file of costs {path}.")
    try:
        tables = load_yaml(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML file: {error}") from None
    if not isinstance(tables, dict) or not tables:
        raise ValueError(f"{path} must map names of tables to their costs, got {tables!r}.")
    found = {}
    for name, table in tables.items():
        where = f"{path}: {name}"
        if not isinstance(name, str):
            raise ValueError(f"{where}: the name of a table must be a string.")
        if name in COSTS_45NM:  # reports and pictures call these Horowitz's
            raise ValueError(f"{where} is the name of a built-in table: choose another.")
        if not isinstance(table, dict):
            raise ValueError(f"{where} must be a mapping with mac and ac, got {table!r}.")
        reject_unknown_keys(table, (field.name for field in fields(Costs)), where)
        for key in ("mac", "ac"):
            if key not in table:
                raise ValueError(f"{where} lacks {key}.")
        for key, value in table.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            free = key == "byte"  # memory may be left out of an account; an operation is never free
            if not number or not math.isfinite(value) or value < 0 or (value == 0 and not free):
                raise ValueError(f"{where}: {key} must be a positive number, got {value!r}.")
        found[name] = Costs(**{key: float(value) for key, value in table.items()})
    return found


def operations(config: SpikingMambaConfig) -> dict[str, int]:
    """Operations of one token in the whole model, by formula.

    MACs, where a lone multiplication or a nonlinear function counts as one, but for ``additions``
    (residuals and biases), which are accumulations. The scan is counted in its recurrent form, the least
    that any schedule of it does. ``docs/energy.md`` has the table.
    """
    width, inner, state, heads = config.hidden_size, _inner(config), config.state_size, config.num_heads
    conv = inner + 2 * config.n_groups * state
    layers, mlps, gated = config.number_of_blocks("mamba"), config.number_of_blocks("mlp"), _gated(config)
    biases = conv * config.use_conv_bias + (_in_proj_width(config) + width) * config.use_bias
    found = {
        "embedding": 0,  # a look-up
        "in_proj": layers * width * _in_proj_width(config) + mlps * width * 2 * gated,
        "conv": layers * conv * (config.conv_kernel + 1),  # the taps, then SiLU
        # dt: bias and softplus, dt * A, exp; dt * x and D * x; for every state: decay, input, output
        "scan": layers * (3 * heads + 2 * inner + 3 * inner * state),
        # RMS norm: square, scale, weight; of a block, of the gated output after silu(z) and its product
        "norms": layers * (3 * width + 5 * inner) + mlps * 3 * width + 3 * width,
        "out_proj": layers * inner * width + mlps * gated * width,
        "lm_head": width * config.vocab_size,
        "additions": layers * (width + biases) + mlps * width,
    }
    return found | ({"mlp": mlps * 2 * gated} if mlps else {})  # SiLU of the gate and its product


def _inner(config: SpikingMambaConfig) -> int:
    return int(config.expand * config.hidden_size)


def _gated(config: SpikingMambaConfig) -> int:
    """Width of the MLP blocks, 0 without."""
    return config.intermediate_size or 0


def _in_proj_width(config: SpikingMambaConfig) -> int:
    return 2 * _inner(config) + 2 * config.n_groups * config.state_size + config.num_heads


def _traffic(config: SpikingMambaConfig, batch: int, length: int) -> dict[str, float]:
    """Numbers that the rest of the model, all but its projections, moves through memory for one token of a
    pass over ``batch`` sequences of ``length`` tokens: weights once a pass, states in and out once a
    sequence, every operand and result once a token."""
    width, inner, state, heads = config.hidden_size, _inner(config), config.state_size, config.num_heads
    conv, layers = inner + 2 * config.n_groups * state, config.number_of_blocks("mamba")
    mlps, gated = config.number_of_blocks("mlp"), _gated(config)
    biases = conv * config.use_conv_bias + (_in_proj_width(config) + width) * config.use_bias
    weights = layers * (conv * config.conv_kernel + biases + 3 * heads + width + inner) + (mlps + 1) * width
    weights += width * config.vocab_size
    states = layers * (conv * config.conv_kernel + inner * state)
    potentials = (layers * (width + inner) + mlps * (width + gated)) * config.states_per_neuron
    activations = layers * (
        width  # norm: in; what comes out is the projection's input, as below
        + 3 * width  # residual: both operands and the sum
        + 2 * conv
        + conv + heads + inner  # scan: x, B, C and dt in, y out
        + 2 * inner  # gated norm: y and z in
    )  # fmt: skip
    activations += mlps * (width + 3 * width + 2 * gated)  # norm, residual, gate and upper half in
    activations += 2 * width + 2 * width + width + config.vocab_size  # embedding, last norm, head
    return {
        "rest": weights / (batch * length) + 2 * states / length + activations,
        "potentials": 2 * potentials / length,
    }


def _compare(energy: dict[str, float]) -> dict[str, float | None]:
    """The machines' energies and the spiking one's gains; a gain is ``None`` where it takes no energy."""
    spiking = energy["spiking"]

    def gain(over: str) -> float | None:
        return energy[over] / spiking if spiking > 0 else None

    return {f"{machine}_pj_per_token": energy[machine] for machine in MACHINES} | {
        "gain": gain("dense"),
        "gain_over_quantised": gain("quantised"),
        "gain_over_quantised_sparse": gain("quantised_sparse"),
    }


@dataclass(frozen=True)
class _Projection:
    """One projection's operations per token."""

    in_features: int
    out_features: int
    accumulations: float
    nonzero_macs: float
    levels: int

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
        }

    def memory(self, cost: Costs, tokens: int) -> dict[str, float]:
        """Weights once a pass of ``tokens``; once a token inputs, written and read, and outputs, written.
        Spike counts and the rival's activations have the same levels and take whole bytes."""
        code = 2 * math.ceil(math.log2(self.levels) / 8) * self.in_features
        weights, output = self.macs / tokens, self.out_features * cost.width
        dense = (weights + 2 * self.in_features) * cost.width + output
        spiking = weights * cost.width + code + output
        rival = weights + code + output  # int8 weights
        moved = zip(MACHINES, (dense, spiking, rival, rival), strict=True)
        return {machine: bytes_ * cost.byte for machine, bytes_ in moved}


def _add(*energies: Mapping[str, float]) -> dict[str, float]:
    return {machine: sum(energy[machine] for energy in energies) for machine in MACHINES}


def _projections(counts: SpikeCounts, config: SpikingMambaConfig) -> dict[str, _Projection]:
    """Per-token operations of every projection; checks that ``counts`` are those of such a model."""
    width, gated = config.hidden_size, _gated(config)
    sizes = {
        "mamba": [(width, _in_proj_width(config)), (_inner(config), width)],
        "mlp": [(width, 2 * gated), (gated, width)],
    }
    wanted = [size for i in range(config.num_hidden_layers) for size in sizes[config.block_type(i)]]
    rows = counts.projections
    if sorted((p.in_features, p.out_features) for p in rows.values()) != sorted(wanted):
        raise ValueError(
            f"The counts of {len(rows)} projections are not those of a spiking model of this configuration, "
            f"which has {len(wanted)}."
        )
    found = {}
    for name, p in rows.items():
        if not p.tokens:
            raise ValueError(f"No token has passed {name}: count the spikes of a forward pass first.")
        if not math.isfinite(p.total):
            raise ValueError(f"The spikes of {name} are not finite: the model has diverged.")
        found[name] = _Projection(
            p.in_features,
            p.out_features,
            p.accumulations / p.tokens,
            p.nonzero_macs / p.tokens,
            2 * p.max_spike_count + 1,
        )
    return found


def model_energy(
    counts: SpikeCounts,
    config: SpikingMambaConfig,
    *,
    measured_in: str = "fp32",
    costs: Mapping[str, Costs] = COSTS_45NM,
    batch: int = 1,
    length: int = 2048,
) -> dict[str, Any]:
    """Energy per token of a spiking model, of its dense twin and of quantised rivals, ready for JSON.

    Args:
        counts: from the forward passes whose accuracy stands beside this figure.
        config: of the model that was counted.
        measured_in: precision of those passes, "fp32", "fp16", "bf16", or the torch dtype's name. Tables
            for another precision are labelled hypothetical.
        costs: tables by name; ``COSTS_45NM | load_costs(path)`` adds a user's own.
        batch, length: of a prefill pass, for memory traffic. A decoding pass has ``batch`` tokens.

    Returns:
        ``hypothetical``: names of tables; ``projections`` and ``model``: for every table the pJ per token of
        the four machines and the spiking one's gains over the others, compute alone; ``with_memory``:
        the same with memory traffic, for prefill (``projections``, ``model``) and decoding
        (``decode_projections``, ``decode``); ``layers``: one row a projection, with ``energy`` by table
        (compute); ``operations_per_token``: see :func:`operations`; ``costs``, ``pass``: what went in.
        A ratio below 1 means that spikes cost more; it is ``None`` where spikes cost nothing at all.

    Raises:
        ValueError: the counts are empty, not finite, or not those of ``config``'s model.
    """
    if batch < 1 or length < 1:
        raise ValueError(f"batch and length must be positive, got {batch} and {length}.")
    projections = _projections(counts, config)
    counted = operations(config)
    rest_macs = sum(n for name, n in counted.items() if name not in (*PROJECTIONS, "additions"))
    levels = next(iter(projections.values())).levels
    neurons = sum(p.in_features for p in projections.values())
    measured_in = _PRECISION.get(measured_in, measured_in)

    sections: dict[str, dict[str, Any]] = {
        name: {} for name in ("projections", "model", "memory", "memory_model", "decode", "decode_model")
    }
    for name, cost in costs.items():
        compute = _add(*(p.compute(cost) for p in projections.values()))
        rest = rest_macs * cost.mac + counted["additions"] * cost.ac
        # a neuron compares and subtracts once a micro-step, and leaks; the rivals scale and round
        leak = neurons * cost.mac if config.states_per_neuron else 0.0
        encoders = {
            "dense": 0.0,
            "spiking": neurons * (levels // 2) * cost.ac + leak,
            "quantised": neurons * cost.mac,
            "quantised_sparse": neurons * cost.mac,
        }
        model = _add(compute, encoders, dict.fromkeys(MACHINES, rest))
        sections["projections"][name] = _compare(compute)
        sections["model"][name] = _compare(model)
        for prefix, tokens in (("memory", length), ("decode", 1)):
            moved = _add(*(p.memory(cost, batch * tokens) for p in projections.values()))
            other = {key: n * cost.width * cost.byte for key, n in _traffic(config, batch, tokens).items()}
            everything = _add(model, moved, dict.fromkeys(MACHINES, other["rest"]))
            everything["spiking"] += other["potentials"]
            sections[prefix][name] = _compare(_add(compute, moved))
            sections[prefix + "_model"][name] = _compare(everything)

    return {
        "measured_in": measured_in,
        "hypothetical": [name for name in costs if name != measured_in],
        "projections": sections["projections"],
        "model": sections["model"],
        "with_memory": {
            "projections": sections["memory"],
            "model": sections["memory_model"],
            "decode_projections": sections["decode"],
            "decode": sections["decode_model"],
        },
        "layers": [
            {
                "name": name,
                "mean_abs": counts.projections[name].mean_abs,
                "nonzero_share": counts.projections[name].nonzero_share,
                "accumulations_per_token": p.accumulations,
                "dense_macs_per_token": p.macs,
                "energy": {table: _compare(p.compute(cost)) for table, cost in costs.items()},
            }
            for name, p in projections.items()
        ],
        "operations_per_token": counted | {"neurons": neurons * (levels // 2)},
        "costs": {name: asdict(cost) for name, cost in costs.items()},
        "pass": {"batch": batch, "length": length},
    }


def projection_energy(counts: SpikeCounts) -> dict[str, float]:
    """How many times less energy the spiking projections take at 45 nm, by operation counts alone.

    Returns:
        ``fp32``, ``fp16``, ``int8``: dense MACs against accumulations, each at that table. ``quantised``:
        against a network with the same 2D + 1 activation levels, int8 weights and integer MACs, the int8
        table for both. ``quantised_sparse``: the same rival if it skips zero activations. A ratio below 1
        means that spikes cost more; without a spike it is infinite. ``fp16`` and ``int8`` are hypothetical
        where the accuracy was measured in another precision.
    """
    done = counts.accumulations

    def gain(macs: float, cost: Costs) -> float:
        return macs * cost.mac / (done * cost.ac) if done else math.inf

    ratios = {name: gain(counts.dense_macs, cost) for name, cost in COSTS_45NM.items()}
    ratios["quantised"] = ratios["int8"]
    ratios["quantised_sparse"] = gain(counts.nonzero_macs, COSTS_45NM["int8"])
    return ratios
