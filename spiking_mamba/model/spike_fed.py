"""What a Mamba2 mixer and an MLP share: an input and an output projection, each fed by spikes."""

from typing import Any, ClassVar, cast

import torch
from spikingjelly.activation_based.base import MemoryModule
from torch import nn

import neurons
from spiking_mamba.model import cache as caches
from spiking_mamba.model.cache import Cache
from spiking_mamba.model.configuration import PROJECTIONS, SpikingMambaConfig
from spiking_mamba.model.packing import Packing
from spiking_mamba.model.projection import SpikeEncoder, project

__all__ = ["SpikeFed"]


class SpikeFed(nn.Module):
    """A module with linear layers ``in_proj`` and ``out_proj``, and what feeds them with spikes.

    That is ``in_spikes`` and ``out_spikes``.
    """

    encoders: ClassVar = {"in_proj": "in_spikes", "out_proj": "out_spikes"}

    def __init__(self, config: SpikingMambaConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.states_per_neuron = config.states_per_neuron
        self.register_load_state_dict_pre_hook(_rename_first_form)

    def _encoder(self, config: SpikingMambaConfig, name: str, size: tuple[int, int]) -> SpikeEncoder:
        """What feeds a projection of that name, of ``(in_features, out_features)``."""
        return SpikeEncoder(
            neuron=None if config.neuron is None else _node(config.neuron),
            membrane=config.membrane,
            threshold=config.layer_threshold(self.layer_idx)[name],
            learn_threshold=config.learn_threshold,
            sgc=config.sgc,
            spike_driven=config.spike_driven,
            shifts=size if config.shift_inputs else None,
        )

    def before_out_proj(self) -> list[torch.Tensor]:
        """What scales that which ``out_proj``'s neuron gets, as views of parameters."""
        raise NotImplementedError

    def step(
        self,
        hidden_states: torch.Tensor,
        conv_state: torch.Tensor,
        scan_state: torch.Tensor,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """One token, ``[B, 1, hidden_size] -> [B, 1, hidden_size]``; the layer's states move on in place."""
        raise NotImplementedError

    def _project(
        self,
        name: str,
        x: torch.Tensor,
        cache: Cache | None,
        packing: Packing | None = None,
        accumulations: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Run a projection; its neuron's states live in slots of the cache behind convolution and scan.

        Args:
            name: "in_proj" or "out_proj". x: ``[B, L, in_features]``.
            cache: states of the tokens before; None without.
            packing: where the tokens are.
            accumulations: takes up how many accumulations the spikes cost, and how many weights they fetch,
                float32 ``[B, L, 2]``.
        """
        linear, encoder = getattr(self, name), getattr(self, self.encoders[name])
        if cache is None or not self.states_per_neuron:
            spikes = encoder(x, packing=packing)
        else:
            first = 1 + PROJECTIONS.index(name) * self.states_per_neuron
            slots = range(first, first + self.states_per_neuron)
            states = caches.neuron_states(cache, self.layer_idx, slots)
            spikes = encoder(x, states, packing)
            caches.update_neuron_states(cache, self.layer_idx, slots, states)
        if accumulations is not None and spikes.emitted is not None:
            size = spikes.emitted.abs()
            # of "fires at all", the slope is that of counts of one; torch.clamp has none on its bound
            fires = torch.where(size > 1, torch.ones_like(size), size)
            sums = [part.sum(-1, dtype=torch.float32) for part in (size, fires)]
            accumulations.append(torch.stack(sums, -1) * linear.out_features)
        return project(linear, spikes)


def _node(spec: dict[str, Any]) -> MemoryModule:
    """A node on the default device; where that is meta by way of the CPU: some read numbers from tensors."""
    if torch.get_default_device().type != "meta":
        return cast(MemoryModule, neurons.build(spec))
    with torch.device("cpu"):
        node = neurons.build(spec)
    return cast(MemoryModule, node.to("meta"))


def _rename_first_form(module: SpikeFed, state_dict: dict, prefix: str, *args: object) -> None:
    """Take up checkpoints in which neuron and threshold belonged to the linear layer."""
    for linear, encoder in module.encoders.items():
        for part in ("log_threshold", "neuron."):
            old = f"{prefix}{linear}.{part}"
            for key in [key for key in state_dict if key.startswith(old)]:
                state_dict[f"{prefix}{encoder}.{key.removeprefix(f'{prefix}{linear}.')}"] = state_dict.pop(
                    key
                )


# the same for from_pretrained
FIRST_FORM = {
    f"{linear}.{part}": f"{encoder}.{part}"
    for linear, encoder in SpikeFed.encoders.items()
    for part in ("log_threshold", "neuron")
}
