"""Steps of a uniform quantiser: for every projection the one that rounds its inputs with the least error.

And steps that are large enough for its largest inputs.
"""

from typing import Any

import torch
from tokens import END

import neurons
from spiking_mamba import SpikingMambaForCausalLM
from spiking_mamba.model.modes import hooked
from spiking_mamba.model.projection import spike_fed

__all__ = ["least_error", "recorded_inputs", "uncut"]

_STEPS = 40
_MOST = 2**18  # numbers of a projection that are looked at


@torch.no_grad()
def recorded_inputs(
    model: SpikingMambaForCausalLM,
    ids: torch.Tensor,
    first: int = 0,
    most: int = _MOST,
    levels: dict[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """What every projection is given, flat float32, by its name; of every n-th token where there are many.

    Whole tokens, since channels differ in size: every n-th number could miss some of them altogether. Ends of
    text are left out: they are so much larger than all other tokens that steps which fit them silence those.

    Args:
        model: dense.
        ids: ``[B, L]``. first: places of each row that are left out.
        most: numbers of a projection that are kept, about.
        levels: of every channel by projection, that are subtracted; None: none are.
    """
    inputs: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0][counted].float()  # [tokens, channels]
            x = x if levels is None else x - levels[name]
            inputs.setdefault(name, []).append(x[:: max(1, len(ids) * x.numel() // most)].flatten())

        return hook

    handles = [p.linear.register_forward_pre_hook(keep(name)) for name, p in spike_fed(model)]
    with hooked(handles):
        for row in ids.split(1):
            counted = row != END
            counted[:, :first] = False
            model.backbone(row, use_cache=False)
    return {name: torch.cat(parts) for name, parts in inputs.items()}


@torch.no_grad()
def least_error(
    model: SpikingMambaForCausalLM,
    ids: torch.Tensor,
    neuron: dict,
    first: int = 0,
    levels: dict[str, torch.Tensor] | None = None,
) -> list[dict[str, float]]:
    """V_th of every projection of a dense model, as ``threshold`` of a configuration takes them.

    Of the largest input over D and shares of it the one with the least squared error of ``V_th * S(x /
    V_th)``.

    Args:
        model: dense.
        ids: ``[B, L]`` on the model's device. neuron: of the student.
        first, levels: see :func:`recorded_inputs`.
    """
    node = neurons.build(neuron)
    most = int(node.max_spike_count)  # type: ignore[arg-type]
    layers: list[dict[str, float]] = [{} for _ in range(model.config.num_hidden_layers)]
    for name, x in recorded_inputs(model, ids, first, levels=levels).items():
        whole = float(x.abs().max()) / most
        steps = [whole * 0.85**k for k in range(_STEPS)]
        errors = [float(((x / v).round().clamp(-most, most) * v - x).square().sum()) for v in steps]
        step = steps[min(range(_STEPS), key=errors.__getitem__)]
        _, _, layer, _, projection = name.split(".")
        layers[int(layer)][projection] = float(f"{step:.4g}")
    return layers


@torch.no_grad()
def uncut(
    layers: list[dict[str, float]],
    model: SpikingMambaForCausalLM,
    tokens: torch.Tensor,
    most: int,
    share: float,
    levels: dict[str, torch.Tensor] | None = None,
) -> list[dict[str, float]]:
    """V_th of every projection, raised to where at most a share of its inputs is cut off at D.

    Rounding is what a calibration weighs; of a converted Transformer, whose inputs have long tails, cutting
    off costs more. Ends of text, which are larger than all other tokens, are left out.

    Args:
        layers: V_th as ``calibrate_thresholds`` returns them.
        model: dense.
        tokens: ``[B, L]`` on the model's device.
        most: D.
        share: of a projection's inputs; of 0 none is cut off.
        levels: at which inputs rest, see :func:`recorded_inputs`.
    """
    counted, largest = tokens != END, {}

    def look(name: str) -> Any:
        def hook(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0][counted].float()
            x = (x if levels is None else x - levels[name]).abs().flatten()
            largest[name] = float(x.topk(min(len(x), 1 + int(share * len(x)))).values[-1])

        return hook

    handles = [p.linear.register_forward_pre_hook(look(name)) for name, p in spike_fed(model)]
    with hooked(handles):
        model.backbone(tokens, use_cache=False)
    raised = [dict(layer) for layer in layers]
    for name, value in largest.items():
        _, _, layer, _, projection = name.split(".")
        own = raised[int(layer)]
        own[projection] = max(own[projection], float(f"{value / (most + 0.5):.4g}"))  # D + 1/2 rounds to D
    return raised
