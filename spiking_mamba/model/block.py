"""Mamba2's mixer and block with spikes in front of both projections, plain and compiled.

The path of a token through a block: the norm, ``in_proj`` behind its neuron, the causal convolution, the
selective scan, the gated norm, ``out_proj`` behind its neuron; what comes out is added to what went in (Dao &
Gu, arXiv 2405.21060, section 7; the neurons: Huang et al., arXiv 2510.04595).
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from spiking_mamba.model import cache as caches
from spiking_mamba.model import scan
from spiking_mamba.model.cache import Cache, takes_any_cache_name
from spiking_mamba.model.configuration import SpikingMambaConfig
from spiking_mamba.model.mlp import SpikingMambaMLP
from spiking_mamba.model.norms import GatedRMSNorm, RMSNorm
from spiking_mamba.model.packing import Packing
from spiking_mamba.model.spike_fed import SpikeFed

__all__ = ["SpikingMambaBlock", "SpikingMambaMixer"]


def _last(window: torch.Tensor, taps: int, packing: Packing | None) -> torch.Tensor:
    """The last ``taps`` inputs ``[B, taps, C]`` of each row of ``[B, taps + L, C]`` before its padding.

    Zeros where they belong to a document before the last.
    """
    if packing is None:
        return window[:, -taps:]
    ends = packing.lengths(window[:, taps:])
    at = ends[:, None] + torch.arange(taps, device=window.device)  # [B, taps]
    last = window.gather(1, at[..., None].expand(-1, -1, window.shape[2]))
    if packing.document is None:
        return last
    document = F.pad(packing.document, (taps, 0), value=0).gather(1, at)
    return last.masked_fill((document != document[:, -1:])[..., None], 0)


class CausalConv1d(nn.Conv1d):
    """Mamba2's depthwise convolution and the activation behind it.

    Its weights are read within its own call, for those of an offloaded model are nowhere else.
    """

    def __init__(self, channels: int, taps: int, bias: bool, activation: str) -> None:
        super().__init__(channels, channels, taps, groups=channels, padding=taps - 1, bias=bias)
        self.activation = activation

    def forward(
        self, x: torch.Tensor, state: torch.Tensor | None = None, document: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``[B, L, C] -> [B, L, C]``, tokens seeing their own document ``[B, L]``.

        Or a single token behind a state ``[B, C, K]``, which moves on in place.
        """
        weight = self.weight.squeeze(1)
        if state is not None:
            return scan.causal_conv1d_update(x, state, weight, self.bias, self.activation)
        return scan.causal_conv1d(x, weight, self.bias, self.activation, document)


class SpikingMambaMixer(SpikeFed):
    """Mamba2's mixer between two linear layers fed by spikes; parameters and names are Mamba2's.

    A mixer that is made alone has Mamba2's initial values, its time steps evenly spaced; a whole model draws
    them, see ``SpikingMambaPreTrainedModel``.
    """

    def __init__(self, config: SpikingMambaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.hidden_size = config.hidden_size
        self.intermediate_size = config.expand * config.hidden_size
        self.num_heads = config.num_heads
        self.head_dim = config.head_dim
        self.n_groups = config.n_groups
        self.ssm_state_size = config.state_size
        self.conv_kernel_size = config.conv_kernel
        self.conv_dim = self.intermediate_size + 2 * config.n_groups * config.state_size
        self.chunk_size = config.chunk_size
        low, high = config.time_step_limit
        self.time_step_limit = (low, high)

        self.conv1d = CausalConv1d(self.conv_dim, config.conv_kernel, config.use_conv_bias, config.hidden_act)
        width = self.intermediate_size + self.conv_dim + config.num_heads
        self.in_spikes = self._encoder(config, "in_proj", (config.hidden_size, width))
        self.in_proj = nn.Linear(config.hidden_size, width, bias=config.use_bias)
        self.dt_bias = nn.Parameter(torch.empty(config.num_heads))
        self.A_log = nn.Parameter(torch.empty(config.num_heads))
        self.D = nn.Parameter(torch.empty(config.num_heads))
        self.initialise(config, torch.linspace(0.0, 1.0, config.num_heads))
        self.norm = GatedRMSNorm(self.intermediate_size, config.n_groups, config.layer_norm_epsilon)
        self.out_spikes = self._encoder(config, "out_proj", (self.intermediate_size, config.hidden_size))
        self.out_proj = nn.Linear(self.intermediate_size, config.hidden_size, bias=config.use_bias)

    @torch.no_grad()
    def initialise(self, config: SpikingMambaConfig, quantiles: torch.Tensor) -> None:
        """Set ``A = -1, -2, ...``, ``D = 1`` and the bias of the time step.

        Args:
            config: its ``time_step_min``, ``time_step_max`` and ``time_step_floor`` count.
            quantiles: ``[num_heads]`` in [0, 1], where each head's time step lies between the logarithms of
                ``time_step_min`` and ``time_step_max``.
        """
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        dt = torch.exp(quantiles * (high - low) + low).clamp(min=config.time_step_floor)
        values = {
            "A_log": torch.arange(1, self.num_heads + 1, dtype=torch.float32).log(),
            "D": torch.ones(self.num_heads),
            "dt_bias": dt + torch.log(-torch.expm1(-dt)),  # the inverse of softplus
        }
        for name, value in values.items():
            init.copy_(getattr(self, name), value)

    def before_out_proj(self) -> list[torch.Tensor]:
        """The gated norm's weight."""
        return [self.norm.weight]

    @takes_any_cache_name
    def forward(
        self,
        hidden_states: torch.Tensor,
        cache: Cache | None = None,
        packing: Packing | None = None,
        accumulations: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """``[B, L, hidden_size] -> [B, L, hidden_size]``; states are read from and written to the cache.

        ``packing`` and ``accumulations`` as in :class:`SpikeFed`.
        """
        batch, length, _ = hidden_states.shape
        scan_state = conv_state = None
        if cache is not None:
            scan_state = caches.scan_state(cache, self.layer_idx)
            conv_state = caches.conv_state(cache, self.layer_idx)
            moves_in_place = length == 1 and packing is None and not torch.is_grad_enabled()
            moves_in_place = moves_in_place and accumulations is None
            if conv_state is not None and scan_state is not None and moves_in_place:
                return self.step(hidden_states, conv_state, scan_state, cache)

        gate, xBC, dt = self._split(self._project("in_proj", hidden_states, cache, packing, accumulations))
        xBC = self._convolve(xBC, conv_state, cache, packing)
        x, B, C = self._split_heads(xBC)
        y = scan.chunk_scan(
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
            return_final_states=cache is not None,
            document=None if packing is None else packing.document,
            real=None if packing is None else packing.real,
        )
        if cache is not None:
            y, scan_state = y
            caches.update_scan_state(cache, self.layer_idx, scan_state)
        y = self.norm(y.reshape(batch, length, -1), gate)
        return self._project("out_proj", y.to(hidden_states.dtype), cache, packing, accumulations)

    def _convolve(
        self,
        xBC: torch.Tensor,
        state: torch.Tensor | None,
        cache: Cache | None,
        packing: Packing | None,
    ) -> torch.Tensor:
        """The convolution of ``[B, L, conv_dim]`` behind the inputs before, which move on in the cache."""
        length, taps = xBC.shape[1], self.conv_kernel_size
        document = None if packing is None else packing.document
        if cache is not None:
            before = xBC.new_zeros(xBC.shape[0], taps, xBC.shape[2])
            if state is not None:
                before = state.transpose(1, 2).to(xBC.dtype)
            window = torch.cat([before, xBC], 1)  # [B, taps + L, conv_dim]
            caches.update_conv_state(cache, self.layer_idx, _last(window, taps, packing).transpose(1, 2))
            if state is not None:
                xBC = window
                document = None if document is None else F.pad(document, (taps, 0), value=0)
        return self.conv1d(xBC, document=document)[:, -length:]

    def step(
        self,
        hidden_states: torch.Tensor,
        conv_state: torch.Tensor,
        scan_state: torch.Tensor,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """One token, ``[B, 1, hidden_size] -> [B, 1, hidden_size]``.

        ``conv_state`` ``[B, conv_dim, K]`` and ``scan_state`` ``[B, H, P, N]`` move on in place; the
        neurons' states, where they have any, are in the cache.
        """
        gate, xBC, dt = self._split(self._project("in_proj", hidden_states, cache))
        xBC = self.conv1d(xBC, conv_state)
        x, B, C = (tensor[:, 0] for tensor in self._split_heads(xBC))
        y = scan.state_update(
            scan_state, x, dt[:, 0], self._A(), B, C, self.D, self.dt_bias, self.time_step_limit
        )
        y = self.norm(y.flatten(1).unsqueeze(1), gate)
        return self._project("out_proj", y.to(hidden_states.dtype), cache)

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


_MIXERS: dict[str, type[SpikeFed]] = {"mamba": SpikingMambaMixer, "mlp": SpikingMambaMLP}


class SpikingMambaBlock(GradientCheckpointingLayer):
    """The residual block around a :class:`SpikingMambaMixer` or a :class:`SpikingMambaMLP`.

    The latter where the configuration's ``layers_block_type`` says "mlp".
    """

    def __init__(self, config: SpikingMambaConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = _MIXERS[config.block_type(layer_idx)](config, layer_idx)
        self.compiles = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`forward`, which learns here whether somebody looks into the block."""
        # gradient checkpointing computes again, when those who watched have gone, what was computed here
        watched = self.compiles and self._is_watched()  # which a token has no time for where it is not asked
        return super().__call__(*args, **{"watched": watched} | kwargs)

    @takes_any_cache_name
    def forward(
        self,
        hidden_states: torch.Tensor,
        cache: Cache | None = None,
        packing: Packing | None = None,
        output_accumulations: bool = False,
        watched: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """``[B, L, hidden_size] -> [B, L, hidden_size]``, and if asked for, what the spikes cost.

        How many accumulations those of each token cost and how many weights they fetch, float32 ``[B, L,
        2]``. One whose inside is watched runs uncompiled.
        """
        run = self._run
        if self.compiles and cache is None and not watched:
            run = functools.partial(_compiled_block(), self)
        return run(hidden_states, cache, packing, output_accumulations)

    def _run(
        self,
        hidden_states: torch.Tensor,
        cache: Cache | None,
        packing: Packing | None,
        output_accumulations: bool,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        accumulations: list[torch.Tensor] | None = [] if output_accumulations else None
        normalised, residual = self._normalise(hidden_states)
        hidden_states = residual + self.mixer(normalised, cache, packing, accumulations)
        if accumulations is None:
            return hidden_states
        return hidden_states, sum(accumulations, torch.zeros(2, device=residual.device))

    def divide_before(self, name: str, threshold: float | torch.Tensor) -> None:
        """Let the neuron before ``in_proj`` or ``out_proj`` get its input over V_th, by what scales it."""
        for tensor in [self.norm.weight] if name == "in_proj" else self.mixer.before_out_proj():
            tensor.div_(threshold)

    def _normalise(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The mixer's input and the residual stream, each ``[B, L, hidden_size]``."""
        residual = hidden_states.float() if self.residual_in_fp32 else hidden_states
        return self.norm(hidden_states.to(self.norm.weight.dtype)), residual

    def step(self, hidden_states: torch.Tensor, cache: Cache) -> torch.Tensor:
        """One token with a cache that has states, ``[B, 1, hidden_size] -> [B, 1, hidden_size]``.

        Compiled unless its neurons have states.
        """
        conv_state = caches.conv_state(cache, self.layer_idx)
        scan_state = caches.scan_state(cache, self.layer_idx)
        if self.mixer.states_per_neuron:
            return self._step(hidden_states, conv_state, scan_state, cache)
        return _compiled_step()(self, hidden_states, conv_state, scan_state)

    def _step(
        self,
        hidden_states: torch.Tensor,
        conv_state: torch.Tensor | None,  # None of an MLP
        scan_state: torch.Tensor | None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        normalised, residual = self._normalise(hidden_states)
        mixer: Any = self.mixer
        return residual + mixer.step(normalised, conv_state, scan_state, cache)

    def _is_watched(self) -> bool:
        """Whether somebody looks into the block, at its spikes, say: a compiled one is opaque."""
        modules = itertools.islice(self.modules(), 1, None)
        return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled with floats as constants: torch's tracer fails where one of an autograd function's changes."""
    compiled = torch.compile(function)

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args)
        with torch._dynamo.config.patch(specialize_float=True):
            return compiled(*args)

    return run


@functools.cache
def _compiled_block() -> Callable[..., torch.Tensor | tuple[torch.Tensor, torch.Tensor]]:
    # one function for all blocks of all models: they share what was compiled, being alike
    return _compiled(SpikingMambaBlock._run)


@functools.cache
def _compiled_step() -> Callable[..., torch.Tensor]:
    return _compiled(SpikingMambaBlock._step)
