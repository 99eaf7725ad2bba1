"""What rounding a layer's weights costs a model, to second order, and which layers are worth more bits.

Weights that are wrong by ``D`` put an error ``D x`` on a layer's output. Errors of different outputs and of
different layers taken as independent, they raise the KL divergence from the unrounded model by
``sum_o E[g_o^2] E[(D x)_o^2] / 2`` a token, with ``g`` the gradient of the log-probability of a token drawn
from the model by the output.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from neurons.event_linear import EventDrivenLinear
from spiking_mamba.model.modeling import SpikingMambaForCausalLM
from spiking_mamba.model.modes import evaluating, frozen, hooked
from spiking_mamba.model.projection import spike_fed

__all__ = ["layers_of", "rounded_layers", "rounding_costs", "second_moments", "squared_gradients"]

_ROWS = 4  # of text at a time
_TOKENS = 8192  # for which gradients are taken


def rounded_layers(
    model: SpikingMambaForCausalLM,
    weights: str,
    tokens: torch.Tensor | None = None,
    tolerance: float | None = None,
) -> dict[str, EventDrivenLinear]:
    """Projections and head with integer weights, by the names of the model's layers.

    Args:
        model: not event-driven, left as it is.
        weights: 'int8' or 'int4'.
        tokens: for int4, int64 ``[rows, length]``, for which they are rounded; None: each to the nearest.
        tolerance: nats a token that 4-bit weights may cost, by :func:`rounding_costs` on these tokens: those
            layers are int8 that cost most for the bytes they save; None: none is.
    """
    layers = layers_of(model)
    if tokens is None:
        return {name: EventDrivenLinear.from_linear(layer, weights) for name, layer in layers.items()}
    moments = second_moments(model, tokens, layers)
    made = {
        name: EventDrivenLinear.from_linear(layer, weights, moments=moments[name])
        for name, layer in layers.items()
    }
    if tolerance is not None:
        costs = rounding_costs(model, tokens, layers, made, moments)
        left = sum(costs.values())
        for name in sorted(costs, key=lambda name: costs[name] / layers[name].weight.numel(), reverse=True):
            if left <= tolerance:
                break
            made[name] = EventDrivenLinear.from_linear(layers[name], "int8")
            left -= costs[name]
    return made


def layers_of(model: SpikingMambaForCausalLM) -> dict[str, nn.Linear]:
    """The layers that become integers, by name: all projections and the head."""
    layers = {name: cast(nn.Linear, projection.linear) for name, projection in spike_fed(model)}
    return layers | {"lm_head": model.lm_head}


@torch.no_grad()
def second_moments(
    model: SpikingMambaForCausalLM, tokens: torch.Tensor, layers: dict[str, nn.Linear]
) -> dict[str, torch.Tensor]:
    """The sum of ``x x^T`` over what each layer gets for these tokens, float32 ``[in, in]`` by name.

    Args:
        model: evaluated, and left as it is.
        tokens: int64 ``[rows, length]``.
        layers: of the model, by any names.
    """
    found: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        def add(_: nn.Module, given: tuple[Any, ...]) -> None:
            x = given[0].flatten(0, -2).float()
            found[name] = found[name].addmm_(x.t(), x) if name in found else x.t() @ x

        return add

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    with hooked(hooks), evaluating(model):
        for rows in tokens.to(model.device).split(_ROWS):
            model(rows, use_cache=False)
    return found


def rounding_costs(
    model: SpikingMambaForCausalLM,
    tokens: torch.Tensor,
    layers: dict[str, nn.Linear],
    made: dict[str, EventDrivenLinear],
    moments: dict[str, torch.Tensor],
) -> dict[str, float]:
    """Nats a token by which each layer's rounding takes the model away from itself, see this module.

    Args:
        model: whose layers they are.
        tokens: int64 ``[rows, length]``; gradients are taken for the first 8192 or so.
        layers: by name. made: the same, rounded.
        moments: sums of ``x x^T`` over these tokens, ``[in, in]``, of each layer.
    """
    rows = tokens[: max(1, _TOKENS // tokens.shape[1])].to(model.device)
    squares = squared_gradients(model, rows.split(_ROWS), layers)
    costs = {}
    for name, layer in layers.items():
        rounded = made[name].integer_weight() * made[name].scale  # [in, out]
        wrong = rounded.t() - layer.weight.detach().float()
        power = ((wrong @ moments[name]) * wrong).sum(1).double() / tokens.numel()  # of each output's error
        costs[name] = float(squares[name] @ power) / rows.numel() / 2
    return costs


def squared_gradients(
    model: SpikingMambaForCausalLM,
    batches: Iterable[torch.Tensor],
    layers: dict[str, nn.Linear],
    first: int = 0,
) -> dict[str, torch.Tensor]:
    """Squared gradients of a drawn token's log-probability by each layer's outputs, summed over tokens.

    The tokens are drawn from the model's own predictions, one a place.

    Args:
        model: evaluated, and left as it is.
        batches: of text, int64 ``[rows, length]``, on the model's device.
        layers: of the model, by any names.
        first: places at the start of every row that are left out.

    Returns:
        float64 ``[out]`` by name; 0 where a layer has no influence.
    """
    found = {name: torch.zeros(layer.out_features).double() for name, layer in layers.items()}
    found = {name: squares.to(model.device) for name, squares in found.items()}
    generator = torch.Generator(model.device).manual_seed(0)

    def watch(name: str) -> Any:
        def add(gradient: torch.Tensor) -> None:
            found[name] += gradient.detach()[:, first:].double().flatten(0, -2).square().sum(0)

        def hook(_: nn.Module, __: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            # of a frozen model nothing asks for a gradient
            output = output if output.requires_grad else output.requires_grad_()
            output.register_hook(add)
            return output

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    with hooked(handles), evaluating(model), frozen(model), torch.enable_grad():
        for ids in batches:
            logits = model(input_ids=ids, use_cache=False).logits[:, first:].float()
            chances = logits.detach().softmax(-1).flatten(0, -2)
            drawn = torch.multinomial(chances, 1, generator=generator)
            nn.functional.cross_entropy(logits.flatten(0, -2), drawn[:, 0], reduction="sum").backward()
    return found
