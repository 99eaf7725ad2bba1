"""SI-LIF: the signed-integer leaky integrate-and-fire neuron as a spikingjelly node."""

import math
from dataclasses import dataclass
from numbers import Real

import torch
from spikingjelly.activation_based.neuron import BaseNode

from . import compensation, functional
from .backend import BACKENDS, check_cupy
from .cupy.si_lif import ops as cupy_ops
from .surrogate import SignedSpikeCount, SurrogateFunctionBase

__all__ = ["SILIFNode"]


_OUTSIDE = -1  # of any backward pass


def _backward_pass() -> int:
    """The number of the backward pass that this call is a part of."""
    return torch._C._current_graph_task_id()


@dataclass
class _Mixture:
    """What a call mixes into its spikes, and the result: beside the output, which hooks see."""

    mode: str
    function: str
    lam: float
    mixed: torch.Tensor | None = None


class SILIFNode(BaseNode):
    r"""Signed-integer leaky integrate-and-fire neuron (SpikingMamba, arXiv 2510.04595).

    .. math::

        H[t] &= (1 - 1/\tau) V[t-1] + X[t] \\
        S[t] &= \mathrm{sign}(u)\,\min(D, \lceil |u| - \tfrac12 \rceil), \qquad u = H[t] / V_{th} \\
        V[t] &= H[t] - V_{th}\, S[t]

    A spikingjelly node: ``[N, *]`` a call in step mode 's', ``[T, N, *]`` in step mode 'm', the potential
    kept between calls until ``functional.reset_net``.

    Args:
        max_spike_count: ``D``, the largest magnitude of a spike count, an integer >= 1.
        tau: time constant in steps, > 1; ``math.inf`` (the default) means no leak.
        v_threshold: the quantum ``V_th``, a float > 0.
        surrogate_function: maps ``u`` to spikes; ``None`` means ``SignedSpikeCount(max_spike_count)``.
        detach_reset: keep the reset out of the backward pass.
        step_mode: 's' or 'm'.
        backend: 'torch', or 'cupy' in step mode 'm' on CUDA. A choice that cannot run raises when the
            node is called, never silently runs something else.
        store_v_seq: keep every step's potential in ``v_seq``.

    Precision: the potential is float32 whatever the input; spikes have the input's dtype, or autocast's
    inside ``torch.autocast``. The input is never modified.

    Within ``torch.utils.checkpoint`` a node runs again in the backward pass, and must begin there as it began
    at first: reset it in the function that is checkpointed, or give it its potential there.

    Raises:
        TypeError: a parameter, or at the call the input, has the wrong type.
        ValueError: a parameter is out of its range.
        RuntimeError: it runs again in a backward pass, from the potential that its first run left.
    """

    supports_stateless_step = True  # it has `stateless_step`
    supports_compensation = True  # it has `compensated`

    max_spike_count: int
    tau: float
    stateless: bool
    v: float | torch.Tensor  # [N, *]; the number 0 before the first step
    _v_is_of = _OUTSIDE  # the backward pass in which v was set last

    def __init__(
        self,
        max_spike_count: int = 4,
        tau: float = math.inf,
        v_threshold: float = 1.0,
        surrogate_function: SurrogateFunctionBase | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        backend: str = "torch",
        store_v_seq: bool = False,
    ) -> None:
        count = SignedSpikeCount(max_spike_count)  # checks max_spike_count, also beside a custom surrogate
        surrogate_function = count if surrogate_function is None else surrogate_function
        if not callable(surrogate_function):
            raise TypeError(f"surrogate_function must be callable, got {surrogate_function!r}.")
        self._check_count(max_spike_count, surrogate_function)
        if not isinstance(v_threshold, float):
            raise TypeError(f"v_threshold must be a float, got {v_threshold!r}.")
        if not (math.isfinite(v_threshold) and v_threshold > 0.0):
            raise ValueError(f"v_threshold must be finite and positive, got {v_threshold}.")
        if not isinstance(tau, Real) or isinstance(tau, bool):
            raise TypeError(f"tau must be a float, got {tau!r}.")
        if not tau > 1.0:
            raise ValueError(f"tau must be greater than 1, got {tau}.")
        if not isinstance(detach_reset, bool):
            raise TypeError(f"detach_reset must be a bool, got {detach_reset!r}.")
        super().__init__(
            v_threshold=v_threshold,
            v_reset=None,
            surrogate_function=surrogate_function,
            detach_reset=detach_reset,
            step_mode=step_mode,
            store_v_seq=store_v_seq,
        )
        self.max_spike_count = int(max_spike_count)
        self.tau = float(tau)
        self.backend = backend
        # Make every element of the input a window of its own that starts at V = 0, keep no potential, in
        # either step mode: half the traffic where every token stands alone. `stateless_step` does so once.
        self.stateless = False

    @staticmethod
    def _check_count(max_spike_count: object, surrogate_function: object) -> None:
        own = getattr(surrogate_function, "max_spike_count", max_spike_count)
        if own != max_spike_count:
            raise ValueError(
                f"The surrogate's max_spike_count={own} is not the node's {max_spike_count}; a node's "
                "surrogate_function may be set, and D is that one's then."
            )

    @property
    def supported_backends(self) -> tuple[str, ...]:
        """The backends of the current step mode."""
        return BACKENDS if self.step_mode == "m" else ("torch",)

    @property
    def backend(self) -> str:
        """The backend that runs the node."""
        return self._backend

    @backend.setter
    def backend(self, value: str) -> None:
        # Whether the step mode and the machine suit is checked at the call, so that neither
        # set_step_mode nor set_backend can raise half-way through a net.
        if value not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {value!r}.")
        self._backend = value

    def extra_repr(self) -> str:
        """What ``repr()`` shows between the brackets."""
        return (
            f"max_spike_count={self.max_spike_count}, tau={self.tau}, v_threshold={self.v_threshold}, "
            f"detach_reset={self.detach_reset}, step_mode={self.step_mode}, backend={self.backend}"
        )

    def materialize_states(
        self, inputs: tuple[torch.Tensor, ...], states: tuple[object, ...], step_mode: str
    ) -> tuple[object, ...]:
        """Give the potential the shape and device of one step of the input.

        In float32, or float64 for a float64 input.
        """
        (x,), (v, *others) = inputs, states
        dtype, shape = functional.state_dtype(x), x.shape[1:] if step_mode == "m" else x.shape
        if isinstance(v, torch.Tensor) and v.shape == shape:
            v = v.to(dtype=dtype, device=x.device)
        else:  # a float before the first step; another shape starts afresh, as everywhere in spikingjelly
            value = 0.0 if isinstance(v, torch.Tensor) else float(v)  # type: ignore[arg-type]
            v = torch.full(shape, value, dtype=dtype, device=x.device)
        return (v, *others)

    def single_step_functional_forward(
        self, inputs: tuple[torch.Tensor, ...], states: tuple[object, ...], **kwargs: object
    ) -> tuple[tuple[torch.Tensor, ...], tuple[object, ...]]:
        """One step with explicit state: ``((x,), (v,)) -> ((spike,), (v,))``."""
        if self.backend == "cupy":
            raise RuntimeError("backend='cupy' runs in step mode 'm' only; this node is in step mode 's'.")
        spike, v = functional.si_lif_step(
            inputs[0],
            states[0],  # type: ignore[arg-type]
            self.tau,
            self.v_threshold,
            self.surrogate_function,
            self.detach_reset,
        )
        return (spike,), (v, *states[1:])

    def _on_cupy(self) -> bool:
        if self.backend == "cupy" and not torch.compiler.is_compiling():
            check_cupy()  # a compiled call checks when the kernel is launched
        return self.backend == "cupy"

    def _signed_spike_count(self, x: torch.Tensor) -> torch.Tensor:
        signed_spike_count = (cupy_ops if self._on_cupy() else functional).signed_spike_count
        return signed_spike_count(x, self.v_threshold, self.surrogate_function)

    def _multi_step(
        self, x_seq: torch.Tensor, v: object, store_v_seq: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        si_lif_multi_step = (cupy_ops if self._on_cupy() else functional).si_lif_multi_step
        return si_lif_multi_step(
            x_seq,
            v,  # type: ignore[arg-type]
            self.tau,
            self.v_threshold,
            self.surrogate_function,
            self.detach_reset,
            store_v_seq,
        )

    def multi_step_functional_forward(
        self, inputs: tuple[torch.Tensor, ...], states: tuple[object, ...], **kwargs: object
    ) -> tuple[tuple[torch.Tensor, ...], tuple[object, ...]]:
        """``T`` steps with explicit state: ``((x_seq,), (v,)) -> ((spike_seq,), (v,))``."""
        spike_seq, v, _ = self._multi_step(inputs[0], states[0], False)
        return (spike_seq,), (v, *states[1:])

    def forward(
        self,
        x: torch.Tensor,
        *args: object,
        stateless: bool = False,
        mixture: _Mixture | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        """The spikes of ``x``; ``stateless`` and ``mixture`` are for the two methods below."""
        if mixture is not None:
            compensated = (cupy_ops if self._on_cupy() else compensation).compensated_spike_count
            spike, mixture.mixed = compensated(
                x, self.surrogate_function, mixture.mode, mixture.function, mixture.lam
            )
            return spike
        if stateless or self.stateless:
            return self._signed_spike_count(x)
        if torch.compiler.is_compiling():
            return super().forward(x, *args, **kwargs)
        now = _backward_pass()
        if now != _OUTSIDE and self._v_is_of != now and isinstance(self.v, torch.Tensor):
            raise RuntimeError(
                f"A {type(self).__name__} runs again in a backward pass, as torch.utils.checkpoint makes it, "
                "from the potential that its first run left; gradients would be wrong. Begin the function "
                "that is checkpointed with functional.reset_net, or pass the potential in and out of it, see "
                "multi_step_functional_forward."
            )
        spike = super().forward(x, *args, **kwargs)
        self.__dict__["_v_is_of"] = now
        return spike

    def __setattr__(self, name: str, value: object) -> None:
        if name == "max_spike_count":
            self._check_count(value, self.surrogate_function)
        super().__setattr__(name, value)
        if name == "surrogate_function" and "max_spike_count" in self.__dict__:  # D is the surrogate's
            count = getattr(value, "max_spike_count", self.max_spike_count)
            self.__dict__["max_spike_count"] = count
        if name == "v" and not torch.compiler.is_compiling():
            self.__dict__["_v_is_of"] = _backward_pass()

    def stateless_step(self, x: torch.Tensor) -> torch.Tensor:
        """The spikes of fresh neurons for one step: a call as if ``stateless`` were set.

        Args:
            x: any shape, in either step mode.

        Returns:
            Spikes of that shape. The node's potential is neither read nor written.
        """
        return self(x, stateless=True)

    def compensated(
        self, u: torch.Tensor, mode: str, function: str, lam: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`stateless_step` at unit threshold, and its spikes with a smooth path mixed in, in one pass.

        Args:
            u: input in units of V_th, any shape.
            mode, function, lam: as in :func:`neurons.compensation.compensate`.

        Returns:
            ``(spike, mixed)``, each of that shape. Hooks of the node see the spikes.

        Raises:
            ValueError: see :func:`neurons.compensation.check_mixture`.
        """
        mixture = _Mixture(mode, function, lam)
        spike = self(u, mixture=mixture)
        assert mixture.mixed is not None
        return spike, mixture.mixed

    def multi_step_forward(self, x_seq: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """``[T, N, *] -> [T, N, *]``, spikes of ``T`` steps; the potential moves on."""
        states: tuple[object, ...] = (self.v,)
        # A fresh neuron starts from the number 0: no tensor of zeros, no pass over it.
        if isinstance(self.v, torch.Tensor) or self.v != 0.0:
            states = self.materialize_states((x_seq,), states, "m")
        spike_seq, self.v, self.v_seq = self._multi_step(x_seq, states[0], self.store_v_seq)
        return spike_seq
