"""A gated MLP with spikes in front of both projections: the other half of a converted Transformer's layer."""

import torch
from torch import nn
from torch.nn import functional as F

from spiking_mamba.model.cache import Cache, takes_any_cache_name
from spiking_mamba.model.configuration import SpikingMambaConfig
from spiking_mamba.model.packing import Packing
from spiking_mamba.model.spike_fed import SpikeFed

__all__ = ["SpikingMambaMLP"]


class SpikingMambaMLP(SpikeFed):
    """``W_out (SiLU(g) * u)`` with ``[g, u] = W_in x`` (Shazeer, arXiv 2002.05202, "SwiGLU").

    Both linear layers are fed by spikes: ``in_proj`` gives the gate, then the upper half,
    ``[2 * intermediate_size]``, and ``out_proj`` leads back to the residual stream. A token meets no other.

    Args:
        config: its ``intermediate_size`` is the MLP's width. Neither projection has a bias, whatever
            ``use_bias`` says of the mixers.
        layer_idx: the layer's number, for its thresholds and its slots in the cache.
    """

    def __init__(self, config: SpikingMambaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        assert config.intermediate_size is not None, "the configuration has checked it"
        width = config.intermediate_size
        self.in_spikes = self._encoder(config, "in_proj", (config.hidden_size, 2 * width))
        self.in_proj = nn.Linear(config.hidden_size, 2 * width, bias=False)
        self.out_spikes = self._encoder(config, "out_proj", (width, config.hidden_size))
        self.out_proj = nn.Linear(width, config.hidden_size, bias=False)

    def before_out_proj(self) -> list[torch.Tensor]:
        """Lower halves of ``in_proj``'s weight and of the constant that is added behind it."""
        constant = self.in_spikes.constant
        both = [self.in_proj.weight] if constant is None else [self.in_proj.weight, constant]
        return [tensor.chunk(2)[1] for tensor in both]

    @takes_any_cache_name
    def forward(
        self,
        hidden_states: torch.Tensor,
        cache: Cache | None = None,
        packing: Packing | None = None,
        accumulations: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """``[B, L, hidden_size] -> [B, L, hidden_size]``.

        ``packing`` and ``accumulations`` as in :class:`SpikeFed`.
        """
        gate, up = self._project("in_proj", hidden_states, cache, packing, accumulations).chunk(2, dim=-1)
        return self._project("out_proj", F.silu(gate) * up, cache, packing, accumulations)

    def step(
        self,
        hidden_states: torch.Tensor,
        conv_state: torch.Tensor | None = None,
        scan_state: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """One token, ``[B, 1, hidden_size] -> [B, 1, hidden_size]``; there is no convolution and no scan."""
        return self(hidden_states, cache)
