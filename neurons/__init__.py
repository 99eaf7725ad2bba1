"""Signed spiking neurons for spikingjelly.

``SILIFNode`` emits signed integers in [-D, D], ``TILIFNode`` ternary micro-steps that sum to the same
integer. They are spikingjelly nodes: swap them in, call ``functional.reset_net`` between sequences.
``EventDrivenLinear`` is a linear layer that fetches the weights of the inputs that fire.
"""

from . import compensation, functional, surrogate
from .backend import set_backend
from .event_linear import EventDrivenLinear
from .micro_steps import MicroStepSum, SignedCountToTernary
from .registry import build, register, spec_of
from .si_lif import SILIFNode
from .surrogate import DeadZoneSpikeCount, SignedSpikeCount
from .ti_lif import TILIFNode

__all__ = [
    "DeadZoneSpikeCount",
    "EventDrivenLinear",
    "MicroStepSum",
    "SILIFNode",
    "SignedCountToTernary",
    "SignedSpikeCount",
    "TILIFNode",
    "build",
    "compensation",
    "functional",
    "register",
    "set_backend",
    "spec_of",
    "surrogate",
]
