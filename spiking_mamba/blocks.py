"""Mamba2's mixer and block with spikes in front of both projections, plain and compiled."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.models.mamba2.modeling_mamba2 import (
    Mamba2Block,
    Mamba2Mixer,
    Mamba2RMSNorm,
    apply_mask_to_padding_states,
)

import neurons

from . import ssd
from .configuration import PROJECTIONS, SpikingMambaConfig
from .projection import SpikingProjection

__all__ = ["SpikingMambaBlock", "SpikingMambaMixer"]


class SpikingMambaMixer(Mamba2Mixer):
    """Mamba2's mixer between two :class:`SpikingProjection`; parameters and names are Mamba2's."""

    def __init__(self, config: SpikingMambaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx, initialize_mixer_weights=False)
        for name, threshold in config.layer_threshold(layer_idx).items():
            dense = getattr(self, name)
            projection = SpikingProjection(
                dense.in_features,
                dense.out_features,
                bias=config.use_bias,
                neuron=None if config.neuron is None else neurons.build(config.neuron),
                membrane=config.membrane,
                threshold=threshold,
                learn_threshold=config.learn_threshold,
                sgc=config.sgc,
                spike_driven=config.spike_driven,
            )
            setattr(self, name, projection)
        self.states_per_neuron = config.states_per_neuron

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache_params: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """``[B, L, hidden_size] -> [B, L, hidden_size]``; states are read from and written to the cache."""
        batch, length, _ = hidden_states.shape
        scan_state = None
        if cache_params is not None:
            scan_state = cache_params.get_recurrent_state(self.layer_idx)
            if length == 1 and (conv_state := cache_params.get_conv_state(self.layer_idx)) is not None:
                hidden_states = apply_mask_to_padding_states(hidden_states, attention_mask)
                return self.step(hidden_states, conv_state, scan_state, cache_params)

        hidden_states = apply_mask_to_padding_states(hidden_states, attention_mask)
        gate, xBC, dt = self._split(self._project("in_proj", hidden_states, cache_params))
        if cache_params is not None:  # what comes back starts with the tokens before these
            xBC = cache_params.update_conv_state(
                xBC.transpose(1, 2), self.layer_idx, conv_kernel_size=self.conv_kernel_size
            ).transpose(1, 2)
        xBC = ssd.causal_conv1d(xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.activation)
        xBC = apply_mask_to_padding_states(xBC[:, -length:], attention_mask)
        x, B, C = self._split_heads(xBC)
        y = ssd.chunk_scan(
            x,
            dt,
            self._A(),
            B,
            C,
            chunk_size=self.chunk_size,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_limit=self.time_step_limit,
            initial_states=scan_state,
            return_final_states=cache_params is not None,
        )
        if cache_params is not None:
            y, scan_state = y
            cache_params.update_recurrent_state(scan_state, self.layer_idx)
        y = self.norm(y.reshape(batch, length, -1), gate)
        return self._project("out_proj", y.to(hidden_states.dtype), cache_params)

    def step(
        self,
        hidden_states: torch.Tensor,
        conv_state: torch.Tensor,
        scan_state: torch.Tensor,
        cache_params: Cache | None = None,
    ) -> torch.Tensor:
        """One token, ``[B, 1, hidden_size] -> [B, 1, hidden_size]``.

        ``conv_state`` ``[B, conv_dim, K]`` and ``scan_state`` ``[B, H, P, N]`` move on in place; the
        neurons' states, where they have any, are in the cache.
        """
        gate, xBC, dt = self._split(self._project("in_proj", hidden_states, cache_params))
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        xBC = ssd.causal_conv1d_update(xBC, conv_state, weight, bias, self.activation)
        x, B, C = (tensor[:, 0] for tensor in self._split_heads(xBC))
        y = ssd.state_update(
            scan_state, x, dt[:, 0], self._A(), B, C, self.D, self.dt_bias, self.time_step_limit
        )
        y = self.norm(y.flatten(1).unsqueeze(1), gate)
        return self._project("out_proj", y.to(hidden_states.dtype), cache_params)

    def _A(self) -> torch.Tensor:
        return -torch.exp(self.A_log.float())

    def _split(self, projected: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The input projection's ``gate``, ``xBC`` and ``dt``."""
        return projected.split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)

    def _split_heads(self, xBC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``x`` ``[B, L, H, P]``, ``B`` and ``C`` ``[B, L, G, N]``."""
        groups_width = self.n_groups * self.ssm_state_size
        x, B, C = xBC.split([self.intermediate_size, groups_width, groups_width], dim=-1)
        groups = (self.n_groups, self.ssm_state_size)
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        return x, B.unflatten(-1, groups), C.unflatten(-1, groups)

    def _project(self, name: str, x: torch.Tensor, cache_params: Cache | None) -> torch.Tensor:
        """Run a projection; its neuron's states live in slots of the cache behind convolution and scan."""
        projection = getattr(self, name)
        if cache_params is None or not self.states_per_neuron:
            return projection(x)
        layer = cache_params.layers[self.layer_idx]
        first = 1 + PROJECTIONS.index(name) * self.states_per_neuron
        slots = range(first, first + self.states_per_neuron)
        states = [layer.recurrent_states[i] for i in slots if layer.has_previous_state[i]]
        y = projection(x, states)
        for i, state in zip(slots, states, strict=True):
            layer.update_recurrent_state(state, i)
            layer.has_previous_state[i] = True
        return y


class SpikingMambaBlock(Mamba2Block):
    """Mamba2's block around a :class:`SpikingMambaMixer`."""

    def __init__(self, config: SpikingMambaConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)  # not Mamba2Block's, which would make a mixer to throw away
        self.config = config
        self.layer_idx = layer_idx
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = Mamba2RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = SpikingMambaMixer(config, layer_idx)
        self.compiles = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache_params: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """``[B, L, hidden_size] -> [B, L, hidden_size]``."""
        forward = super().forward
        if self.compiles and cache_params is None and not self._is_watched():
            forward = functools.partial(_compiled_block(), self)
        try:
            return forward(hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs)
        finally:  # out here, so that first and later passes are compiled alike
            for projection in (self.mixer.in_proj, self.mixer.out_proj):
                if projection.keeps_spike_size:
                    projection.keep_spike_size()

    def step(self, hidden_states: torch.Tensor, cache_params: Cache) -> torch.Tensor:
        """One token with a cache that has states, ``[B, 1, hidden_size] -> [B, 1, hidden_size]``; compiled
        unless its neurons have states."""
        conv_state = cache_params.get_conv_state(self.layer_idx)
        scan_state = cache_params.get_recurrent_state(self.layer_idx)
        if self.mixer.states_per_neuron:
            return self._step(hidden_states, conv_state, scan_state, cache_params)
        return _compiled_step()(self, hidden_states, conv_state, scan_state)

    def _step(
        self,
        hidden_states: torch.Tensor,
        conv_state: torch.Tensor,
        scan_state: torch.Tensor,
        cache_params: Cache | None = None,
    ) -> torch.Tensor:
        normalised = self.norm(hidden_states.to(self.norm.weight.dtype))
        residual = hidden_states.float() if self.residual_in_fp32 else hidden_states
        return residual + self.mixer.step(normalised, conv_state, scan_state, cache_params)

    def _is_watched(self) -> bool:
        """Whether somebody looks into the block, at its spikes, say: a compiled one is opaque."""
        modules = itertools.islice(self.modules(), 1, None)
        return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


@functools.cache
def _compiled_block() -> Callable[..., torch.Tensor]:
    # one function for all blocks of all models: they share what was compiled, being alike
    return torch.compile(Mamba2Block.forward)


@functools.cache
def _compiled_step() -> Callable[..., torch.Tensor]:
    return torch.compile(SpikingMambaBlock._step)
