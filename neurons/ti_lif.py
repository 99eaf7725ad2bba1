"""TI-LIF: the ternary leaky integrate-and-fire neuron as a spikingjelly node."""

import math

from .si_lif import SILIFNode
from .surrogate import SurrogateFunctionBase

__all__ = ["TILIFNode"]


class TILIFNode(SILIFNode):
    r"""Ternary leaky integrate-and-fire neuron: :class:`SILIFNode` with ``D = 1``, so spikes in {-1, 0, 1}.

    With ``tau = inf``, ``D`` steps with the input at the first one only emit spikes that sum to the count
    of ``SILIFNode(D)``: spike-driven inference computes what integer-valued training learned. ``tau`` acts
    at every micro-step, so a leak from token to token belongs to SI-LIF.

    Arguments, shapes and errors are those of :class:`SILIFNode`; ``surrogate_function=None`` means
    ``SignedSpikeCount(1)``.
    """

    def __init__(
        self,
        tau: float = math.inf,
        v_threshold: float = 1.0,
        surrogate_function: SurrogateFunctionBase | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        backend: str = "torch",
        store_v_seq: bool = False,
    ) -> None:
        super().__init__(
            1, tau, v_threshold, surrogate_function, detach_reset, step_mode, backend, store_v_seq
        )
