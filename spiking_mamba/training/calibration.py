"""Thresholds that let a student start as close to its teacher as its spikes allow.

Counting its input in steps of V adds to a projection's input an error of variance V^2 / 12 (Widrow, IRE
Trans. Circuit Theory 3, 1956), which to second order raises the KL divergence from the teacher by V^2 F / 24
a token, with the Fisher information ``F = sum_o E[g_o^2] sum_c W_oc^2``, where g is the gradient of the
log-probability of a token drawn from the teacher by the projection's output. Its spikes cost ``A / V``
accumulations, ``A = out_features * sum_c E|u_c|``. The least sum of the first for a given sum of the second
has ``V = k (A / F)^(1/3)``. Where inputs are shifted, u is what is left of them; of all levels their medians
make A least. Errors are taken as independent, and what is cut off at D or hardly spikes as if it were rounded
like the rest.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from spiking_mamba.common.keys import reject_unknown_keys
from spiking_mamba.model.configuration import PROJECTIONS
from spiking_mamba.model.modeling import SpikingMambaForCausalLM
from spiking_mamba.model.modes import evaluating, hooked
from spiking_mamba.model.rounding_cost import squared_gradients
from spiking_mamba.spikes.counting import count_spikes
from spiking_mamba.training.spike_penalty import mean_spike_size, share_of_nonzero

__all__ = [
    "asks_for_calibration",
    "calibrate_levels",
    "calibrate_thresholds",
    "first_rows",
    "resolve_threshold",
]

TOKENS = 4096  # that a calibration looks at, where a recipe asks for one
_BATCH = 2048  # tokens at a time
_HALVINGS = 20
_CLIPPED = 0.05  # share of the counts at -D and D above which a calibration warns
_CLOSE = 0.002  # of the mean |s| asked for
_COARSE = 0.02  # of it, by which it may be undercut where counts of so little text allow no better


@torch.no_grad()
def calibrate_levels(
    teacher: SpikingMambaForCausalLM, input_ids: torch.Tensor, first: int = 0
) -> dict[str, torch.Tensor]:
    """Levels at which input channels are to rest: their medians, at which a sum of sizes is least.

    Args:
        teacher: dense; it is left as it is.
        input_ids: text, ``[rows, length]``; its first rows count, some 2048 tokens.
        first: places at the start of every row that are not looked at, see :func:`calibrate_thresholds`.

    Returns:
        float32 ``[in_features]`` by the projections' names, for ``SpikingMambaForCausalLM.rest_at``.

    Raises:
        ValueError: the teacher is not dense, no place is looked at, or an input is not finite.
    """
    if teacher.config.neuron is not None:
        raise ValueError("Levels are calibrated by a dense teacher; this one has neurons.")
    _check_text(input_ids, first)
    levels: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[torch.Tensor]) -> None:
            x = args[0][:, first:].flatten(0, 1).float()
            x = x.sort(0).values  # on CUDA, median() is refused where all is to be deterministic
            if not x[[0, -1]].isfinite().all():  # what is no number comes last
                raise ValueError(f"{name} has inputs on this text that are not finite.")
            levels[name] = x[(len(x) - 1) // 2].clone()

        return hook

    rows = input_ids[: max(1, _BATCH // input_ids.shape[1])].to(teacher.device)
    handles = [m.register_forward_pre_hook(watch(name)) for name, m in _projections(teacher).items()]
    with hooked(handles), evaluating(teacher):
        teacher(input_ids=rows, use_cache=False, logits_to_keep=1)
    return levels


def calibrate_thresholds(
    teacher: SpikingMambaForCausalLM,
    input_ids: torch.Tensor,
    mean_abs: float | None,
    neuron: dict,
    *,
    nonzero: float | None = None,
    first: int = 0,
    levels: dict[str, torch.Tensor] | None = None,
    **student: Any,
) -> list[dict[str, float]]:
    """V_th of every projection, so that a student spikes as much as asked and loses least.

    They are ``k (A / F)^(1/3)``, see this module; k is found by counting.

    Args:
        teacher: dense; it is evaluated and left as it is.
        input_ids: text, ``[rows, length]``, a few thousand tokens.
        mean_abs: the student's mean ``|s|`` on that text, weighted by output width, before distillation.
        neuron: of the student, one that rounds to integers.
        nonzero: its share of non-zero counts, weighted likewise. Of two numbers the one that asks for larger
            thresholds is met, the other is undercut; None: it is not asked for.
        first: places at the start of every row that are not looked at, where a model's first token is of
            another size than all others.
        levels: of :func:`calibrate_levels`, at which the student's inputs will rest; None: they are not
            shifted.
        student: further arguments of ``SpikingMambaForCausalLM.from_dense``.

    Returns:
        ``[{"in_proj": V_th, "out_proj": V_th}, ...]``, a mapping for each layer, four digits each: what
        ``threshold`` of the config takes.

    Raises:
        ValueError: ``mean_abs`` or ``nonzero`` is not positive, both are None, the teacher is not dense, no
            place is looked at, or no V_th gives what is asked for.
    """
    targets = _targets(mean_abs, nonzero)
    if teacher.config.neuron is not None:
        raise ValueError("Thresholds are calibrated by a dense teacher; this one has neurons.")
    _check_text(input_ids, first)
    input_ids = input_ids.to(teacher.device)
    batches = input_ids.split(max(1, _BATCH // input_ids.shape[1]))
    cost, information = _cost_and_information(teacher, batches, first, levels or {})
    shape = {name: (cost[name] / information[name]) ** (1 / 3) for name in cost}
    student |= {"shift_inputs": levels is not None}
    model = SpikingMambaForCausalLM.from_dense(teacher, neuron=neuron, **student).eval()
    # mean |s| falls about as 1 / V: start where the costs say, then close in
    products = sum(p.in_features * p.out_features for p in model.projections().values())
    start = sum(cost[name] / shape[name] for name in cost) / products / min(targets.values())
    scale = _close_in(targets, start, lambda scale: _spiking(model, batches, first, scale, shape, levels))
    _warn_of_clipping(model, batches[0])
    layers: list[dict[str, float]] = [{} for _ in range(teacher.config.num_hidden_layers)]
    for name, value in shape.items():
        _, _, layer, _, projection = name.split(".")
        layers[int(layer)][projection] = float(f"{scale * value:.4g}")
    return layers


def _check_text(input_ids: torch.Tensor, first: int) -> None:
    if input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(f"A calibration takes rows of tokens, [rows, length], not {list(input_ids.shape)}.")
    if not 0 <= first < input_ids.shape[1]:
        raise ValueError(f"Of rows of {input_ids.shape[1]} tokens nothing is left without the first {first}.")


def _targets(mean_abs: float | None, nonzero: float | None) -> dict[str, float]:
    """What is asked for, by the names of :func:`_spiking`."""
    named = {"mean |s|": mean_abs, "share of non-zero counts": nonzero}
    targets = {name: value for name, value in named.items() if value is not None}
    if not targets:
        raise ValueError("Thresholds are calibrated for a mean_abs or a share of non-zero counts.")
    for name, value in (("mean_abs", mean_abs), ("nonzero", nonzero)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value < math.inf):
            raise ValueError(f"{name} must be a positive number, got {value!r}.")
    return targets


def _close_in(targets: dict[str, float], scale: float, measure: Callable[[float], dict[str, float]]) -> float:
    """The scale at which ``measure`` gives of nothing more than its target; the first tried is ``scale``."""
    low, high = 0.0, math.inf
    best, closest = scale, 0.0  # from below
    for _ in range(_HALVINGS):
        got = measure(scale)
        excess = max(got[name] / value for name, value in targets.items())
        if abs(excess - 1) < _CLOSE:
            return scale
        if closest < excess < 1:
            best, closest = scale, excess
        low, high = (scale, high) if excess > 1 else (low, scale)
        scale = scale * excess if excess > 0 else scale / 2
        if not low < scale < high:
            scale = (low + high) / 2 if high < math.inf else 2 * low
    if closest > 1 - _COARSE:
        return best
    tried = " and ".join(f"a {name} of {value}" for name, value in targets.items())
    last = " and ".join(f"{got[name]:.4g}" for name in targets)
    raise ValueError(f"No threshold gives {tried}; the last try gave {last}.")


def _spiking(
    model: SpikingMambaForCausalLM,
    batches: tuple[torch.Tensor, ...],
    first: int,
    scale: float,
    shape: dict[str, float],
    levels: dict[str, torch.Tensor] | None,
) -> dict[str, float]:
    """The mean ``|s|`` and the share of non-zero counts at V_th ``scale * shape``.

    Weighted by output width; the ``first`` places of each row are left out.
    """
    for name, projection in model.projections().items():
        projection.spikes.threshold = scale * shape[name]
    model.rest_at(levels or {})
    sums = {"mean |s|": 0.0, "share of non-zero counts": 0.0}
    with torch.no_grad():
        for ids in batches:
            output = model(input_ids=ids, use_cache=False, logits_to_keep=1, output_accumulations=True)
            size = mean_spike_size(model, output.accumulations[:, first:])
            share = share_of_nonzero(model, output.fetches[:, first:])
            for name, value in zip(sums, (size, share), strict=True):
                sums[name] += float(value) * len(ids)
    rows = sum(len(ids) for ids in batches)
    return {name: value / rows for name, value in sums.items()}


def _warn_of_clipping(model: SpikingMambaForCausalLM, input_ids: torch.Tensor) -> None:
    """A mean |s| that is reached by cutting counts off is hardly what was wanted."""
    with torch.no_grad(), count_spikes(model) as spikes:
        model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
    counted = [p.histogram for p in spikes.projections.values() if p.histogram is not None]
    counted = [levels for levels in counted if len(levels) > 3]  # of ternary spikes all are the largest
    clipped = sum(int(n[0] + n[-1]) for n in counted) / max(1, sum(int(n.sum()) for n in counted))
    if clipped > _CLIPPED:
        warnings.warn(
            f"{clipped:.0%} of the counts are cut off at the largest that the neuron has: with so few "
            "levels, ask for a smaller mean |s|, or give thresholds.",
            stacklevel=3,
        )


def resolve_threshold(threshold: Any, teacher: SpikingMambaForCausalLM, rows: Any, **student: Any) -> Any:
    """``threshold`` as it is, or, of ``{"mean_abs": number}``, the thresholds calibrated on the first rows.

    Args:
        threshold: what a recipe's key says.
        teacher: see :func:`calibrate_thresholds`.
        rows: a data set with ``input_ids`` of equal length.
        student: see :func:`calibrate_thresholds`.
    """
    if not asks_for_calibration(threshold):
        return threshold
    reject_unknown_keys(threshold, ("mean_abs",), "threshold")
    return calibrate_thresholds(teacher, first_rows(rows), threshold["mean_abs"], **student)


def first_rows(rows: Any) -> torch.Tensor:
    """Those of a data set with ``input_ids`` of equal length that are calibrated on, some 4096 tokens."""
    length = len(rows[0]["input_ids"])
    first = rows.select(range(min(len(rows), -(-TOKENS // length))))
    return torch.as_tensor([list(map(int, row["input_ids"])) for row in first])


def asks_for_calibration(threshold: Any) -> bool:
    """Whether it is ``{"mean_abs": ...}``."""
    return isinstance(threshold, dict) and "mean_abs" in threshold


def _projections(teacher: SpikingMambaForCausalLM) -> dict[str, nn.Linear]:
    return {n: m for n, m in teacher.named_modules() if n.rpartition(".")[2] in PROJECTIONS}


def _cost_and_information(
    teacher: SpikingMambaForCausalLM,
    batches: tuple[torch.Tensor, ...],
    first: int,
    levels: dict[str, torch.Tensor],
) -> tuple[dict[str, float], dict[str, float]]:
    """``A`` and ``F`` of :func:`calibrate_thresholds`, by the projections' names, a token.

    The ``first`` places of each row are left out.
    """
    modules = _projections(teacher)
    sizes = {name: 0.0 for name in modules}

    def watch(name: str):
        def hook(_: nn.Module, args: tuple[torch.Tensor]) -> None:
            x = args[0].detach()[:, first:].float()
            sizes[name] += float((x - levels[name] if name in levels else x).abs().sum())

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
    with hooked(handles):
        squares = squared_gradients(teacher, batches, modules, first)
    tokens = sum(ids[:, first:].numel() for ids in batches)
    cost = {name: module.out_features * sizes[name] / tokens for name, module in modules.items()}
    information = {
        name: float((squares[name] @ module.weight.detach().double().square()).sum()) / tokens
        for name, module in modules.items()
    }
    for name in modules:
        if not (math.isfinite(cost[name]) and cost[name] > 0 and 0 < information[name] < math.inf):
            raise ValueError(f"{name} has no input or no influence on this text; V_th cannot be calibrated.")
    return cost, information
