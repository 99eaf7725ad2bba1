"""A linear layer fed by spikes: ``y = V_th W S(x / V_th - r) + b + c``, with compensation (SGC) in training.

What turns activations into spikes stands in front of a plain ``nn.Linear``, so that what wraps, adapts or
quantises projections from outside works here too, and sees spikes. Spikes are never scaled before the
product, which therefore consists of accumulations; V_th scales its result.

``r`` and ``c`` are there where inputs are shifted, else 0: what a channel has in common at all tokens need
not be spiked at each of them. It rests at the level ``V_th r``, at which it is silent, and ``c``, at first
``V_th W r``, carries what all levels together mean to the outputs (channel-wise shifting: Wei et al., arXiv
2304.09145). The level is what is learned, not ``r``: some lie hundreds of quanta from 0, and would move by as
many hundredths of a quantum with every per cent of V_th.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from spikingjelly.activation_based.base import MemoryModule
from torch import nn
from transformers import initialization as init

import neurons
from neurons.compensation import compensate
from neurons.functional import spike_dtype
from spiking_mamba.model.configuration import MEMBRANES
from spiking_mamba.model.membrane import drive, drive_pieces
from spiking_mamba.model.packing import Packing

__all__ = ["ENDS", "SpikeEncoder", "Spikes", "SpikingProjection", "project", "reject_wrapped", "spike_fed"]

ENDS = ("embeddings", "lm_head")  # layers whose weights may be tied


def _scalar(value: float) -> torch.Tensor:
    """A number that a compiled block takes in, where a Python number would be compiled in.

    Always a true float32 on the CPU, even where the model is made on the meta device or in a 16-bit default
    dtype.
    """
    return torch.tensor(float(value), dtype=torch.float32, device="cpu")


class Spikes(NamedTuple):
    """What a :class:`SpikeEncoder` makes of activations ``[B, L, C]``.

    Attributes:
        fed: what the linear layer gets, in the dtype of the activations: the spikes, in training perhaps
            mixed with SGC's smooth path; where inference is spike-driven, ``[D, B, L, C]`` ternary steps.
        emitted: the neuron's spikes ``[B, L, C]``; None without a neuron.
        threshold: V_th, by which the layer's result is to be multiplied; None for 1.
        constant: what is to be added to it, ``[out_features]``; None for nothing.
    """

    fed: torch.Tensor
    emitted: torch.Tensor | None = None
    threshold: float | torch.Tensor | None = None
    constant: torch.Tensor | None = None


class SpikeEncoder(nn.Module):
    """Turns activations into spikes in units of V_th; without a neuron it passes them on.

    Args:
        neuron: a spikingjelly node at unit threshold, or ``None`` in a dense model.
        membrane: 'token' (every token starts at V = 0) or 'sequence' (V runs along the token axis).
        threshold: V_th, > 0, in the units of the activations.
        learn_threshold: train ``log V_th`` as the float32 parameter ``log_threshold``.
        sgc: ``None`` or the complete SGC settings of the config; see :mod:`neurons.compensation`.
        spike_driven: make ternary micro-steps of the integers; without SGC.
        shifts: ``(in_features, out_features)`` of the projection where its inputs are shifted; they are then
            float32 parameters, at first 0: ``level``, in the units of the activations, so that inputs rest
            where they did when V_th is learned, and ``constant``.
    """

    def __init__(
        self,
        neuron: MemoryModule | None = None,
        membrane: str = "token",
        threshold: float = 1.0,
        learn_threshold: bool = False,
        sgc: dict | None = None,
        spike_driven: bool = False,
        shifts: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if membrane not in MEMBRANES:
            raise ValueError(f"membrane must be one of {MEMBRANES}, got {membrane!r}.")
        self.neuron = neuron
        self.membrane = membrane
        # of shape [1]: FSDP shards no scalars
        self.log_threshold = nn.Parameter(torch.zeros(1)) if learn_threshold else None
        inputs, outputs = shifts or (0, 0)
        self.level = nn.Parameter(torch.zeros(inputs)) if inputs else None
        self.constant = nn.Parameter(torch.zeros(outputs)) if outputs else None
        self.threshold = threshold
        self.sgc = sgc
        self.sgc_lambda = 0.0 if sgc is None else float(sgc["lam"])
        self.spike_driven = spike_driven

    def extra_repr(self) -> str:
        """What ``repr()`` shows between the brackets."""
        if self.neuron is None:
            return ""
        threshold = torch.as_tensor(self.threshold).item()
        shifted = ", shifted" if self.level is not None else ""
        return f"membrane={self.membrane}, threshold={threshold:.4g}, sgc={self.sgc}{shifted}"

    @property
    def threshold(self) -> float | torch.Tensor:
        """V_th: a number, or a float32 tensor ``[1]`` where it is learned.

        Setting it makes it a number, from which a learned one goes on.
        """
        return self._threshold if self.log_threshold is None else self.log_threshold.float().exp()

    @threshold.setter
    def threshold(self, value: float) -> None:
        if not 0.0 < float(value) < math.inf:
            raise ValueError(f"threshold must be finite and positive, got {value}.")
        self._threshold = float(value)
        self._unit = self._threshold == 1.0
        self._compiled_threshold = _scalar(value)
        if self.log_threshold is not None:
            init.constant_(self.log_threshold, math.log(self._threshold))

    def _factor(self) -> float | torch.Tensor | None:
        """V_th, None for 1; no number that a compiled block would have to be compiled anew for."""
        if self.log_threshold is not None:
            return self.threshold
        if self._unit:
            return None
        return self._compiled_threshold if torch.compiler.is_compiling() else self._threshold

    @property
    def shift(self) -> torch.Tensor | None:
        """The level in units of V_th, float32 ``[in_features]``; None where inputs are not shifted."""
        threshold = self._factor()
        return self.level if self.level is None or threshold is None else self.level / threshold

    def _load_from_state_dict(
        self, state_dict: dict[str, torch.Tensor], prefix: str, *args: object, **kwargs: object
    ) -> None:
        """Take the ``shift`` of older states, in units of their V_th, for the level that it stands for."""
        if self.level is not None and (old := state_dict.pop(f"{prefix}shift", None)) is not None:
            learned = state_dict.get(f"{prefix}log_threshold")
            own = self._threshold if learned is None else learned.float().exp()
            state_dict.setdefault(f"{prefix}level", old.float() * own)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[arg-type]

    def reset_parameters(self) -> None:
        """Let a learned V_th start again from the number that was given, and levels from 0."""
        self.threshold = self._threshold
        for parameter in (self.level, self.constant):
            if parameter is not None:
                init.zeros_(parameter)

    def fix_threshold(self, value: float) -> None:
        """Make V_th this number, learned no more."""
        self.log_threshold = None
        self.threshold = value

    @property
    def number_of_states(self) -> int:
        """How many states the neuron carries from token to token."""
        return 0 if self.membrane == "token" or self.neuron is None else len(self.neuron._memories)

    @property
    def sgc_lambda(self) -> float:
        """SGC's lambda now, in [0, 1]; 0 switches the path off."""
        return self._sgc_lambda

    @sgc_lambda.setter
    def sgc_lambda(self, lam: float) -> None:
        if not 0.0 <= float(lam) <= 1.0:
            raise ValueError(f"SGC's lambda must lie in [0, 1], got {lam}.")
        if self.sgc is None and lam:
            raise ValueError("There is no SGC whose lambda could be set: the configuration's sgc is None.")
        self._sgc_lambda = float(lam)
        self._compensates = self._sgc_lambda > 0.0
        self._compiled_lambda = _scalar(lam)

    @property
    def max_spike_count(self) -> int:
        """``D`` of the neuron; 1 for one that does not say."""
        surrogate = getattr(self.neuron, "surrogate_function", None)
        return int(getattr(self.neuron, "max_spike_count", getattr(surrogate, "max_spike_count", 1)))

    def forward(self, x: torch.Tensor, states: list | None = None, packing: Packing | None = None) -> Spikes:
        """Encode activations ``[B, L, C]``.

        The neuron's state belongs to the caller: it goes in and comes out, and nothing of it is in the
        module, whatever order a checkpointed backward pass recomputes in, and whoever calls at the same time.

        Args:
            x: in the units of the weights' inputs, any float dtype.
            states: the neuron's states after the previous token, each ``[B, C]``, or an empty list for a
                fresh sequence; replaced by the states after the last token.
            packing: where the tokens are.
        """
        if self.neuron is None:
            return Spikes(x)
        if hasattr(self.neuron, "surrogate_function"):  # what it gets may be wider than what the weight meets
            spike_dtype(x, self.neuron.surrogate_function)
        threshold = self._factor()
        u = x if threshold is None else x.float() / threshold
        if (shift := self.shift) is not None:
            u = u - shift
        if self.training and self._compensates and not self.spike_driven:
            emitted, fed = self._compensated(u, states, packing)
        else:
            emitted = fed = self._emit(u, states, packing)
        if not torch.is_autocast_enabled(x.device.type):
            fed = fed.to(x.dtype)
        if self.spike_driven:
            fed = neurons.SignedCountToTernary(self.max_spike_count)(fed.unsqueeze(0))
        return Spikes(fed, emitted, threshold, self.constant)

    def _emit(
        self, u: torch.Tensor, states: list | None = None, packing: Packing | None = None
    ) -> torch.Tensor:
        """The neuron's spikes ``[B, L, C]`` for ``u``, in units of V_th."""
        node = self.neuron
        assert node is not None
        if self.membrane == "token":
            return node.stateless_step(u[None])[0] if self._stateless else drive(node, u[None], [])[0]
        pieces = None if packing is None else packing.pieces
        states = [] if states is None else states
        if pieces is not None:
            return drive_pieces(node, u, states, pieces)
        return drive(node, u.transpose(0, 1), states).transpose(0, 1)

    @property
    def _stateless(self) -> bool:
        """Whether the node works without a potential: nobody will ask for it, every token being a window."""
        node = self.neuron
        able = getattr(node, "supports_stateless_step", False) and not getattr(node, "store_v_seq", False)
        return self.membrane == "token" and able

    def _compensated(
        self, u: torch.Tensor, states: list | None, packing: Packing | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The spikes, and these with SGC's smooth path mixed in, each ``[B, L, C]``."""
        assert self.sgc is not None
        mode, function = self.sgc["mode"], self.sgc["function"]
        compiling, node = torch.compiler.is_compiling(), self.neuron
        if compiling or not (self._stateless and getattr(node, "supports_compensation", False)):
            lam = self._compiled_lambda if compiling else self._sgc_lambda
            spike = self._emit(u, states, packing)
            return spike, compensate(u, spike, mode, function, lam, self.max_spike_count)
        assert node is not None
        spike, mixed = node.compensated(u[None], mode, function, self._sgc_lambda)
        return spike[0], mixed[0]


def project(linear: nn.Module, spikes: Spikes) -> torch.Tensor:
    """``V_th * W s + b + c``, ``[B, L, out_features]``, by a linear layer with weight ``W`` and bias ``b``.

    The layer is called as it is, for it may be wrapped: where its bias came in scaled or several times, the
    difference is made up for.
    """
    fed, emitted, threshold, constant = spikes
    y, calls = linear(fed), 1
    if emitted is not None and fed.ndim > emitted.ndim:  # micro-steps, each of which met the bias
        calls = fed.shape[0]
        y = neurons.MicroStepSum(calls)(y)[0]
    if threshold is not None:
        y = (y * threshold).to(y.dtype)
    if threshold is not None or calls > 1:
        bias = _bias(linear, fed)
        if bias is not None:
            y = (y + (1 - calls * (1.0 if threshold is None else threshold)) * bias).to(y.dtype)
    return y if constant is None else (y + constant).to(y.dtype)


def _bias(linear: nn.Module, fed: torch.Tensor) -> torch.Tensor | None:
    """What a layer adds whatever it is fed; None for nothing."""
    bias = getattr(linear, "bias", None)
    if not _is_wrapped(linear) and not (bias is not None and bias.is_meta):  # offloaded until it is called
        return bias
    if not any(name.rpartition(".")[2] == "bias" for name, _ in linear.named_parameters()):
        return None
    return linear(fed.new_zeros(1, fed.shape[-1]))[0]  # an adapter may have one of its own


def _is_wrapped(linear: nn.Module) -> bool:
    return any(True for _ in linear.children())


def reject_wrapped(model: nn.Module) -> None:
    """Raise a ValueError where weights are but a part of their layer, or not readable as numbers.

    Those of projections, embeddings and head.
    """
    for name, projection in spike_fed(model):
        weight = getattr(projection.linear, "weight", None)
        if weight is None or weight.dtype == torch.uint8:
            raise ValueError(
                f"{name} holds packed weights, no numbers; what transformers packed, dequantize() unpacks."
            )
        _reject_adapter(name, projection.linear)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ENDS:
            _reject_adapter(name, module)


def _reject_adapter(name: str, layer: nn.Module) -> None:
    if _is_wrapped(layer):
        raise ValueError(
            f"{name} is wrapped by {type(layer).__name__}, as adapters do: merge it first, with PEFT by "
            "merge_and_unload()."
        )


class SpikingProjection(nn.Module):
    """A linear layer and the spikes that feed it, as one layer for any network.

    Inside the model the two stand side by side under names of their own; there this is a view of both, see
    ``SpikingMambaForCausalLM.projections``.

    Args:
        linear: an ``nn.Linear``, or what has taken its place.
        spikes: what feeds it.
    """

    def __init__(self, linear: nn.Module, spikes: SpikeEncoder) -> None:
        super().__init__()
        self.linear = linear
        self.spikes = spikes

    @property
    def neuron(self) -> MemoryModule | None:
        """The node; another one may be put in its place."""
        return self.spikes.neuron

    def __setattr__(self, name: str, value: torch.Tensor | nn.Module) -> None:
        if name == "neuron":  # torch would take a module for a new one of this layer's own
            self.spikes.neuron = value  # type: ignore[assignment]
        else:
            super().__setattr__(name, value)

    @property
    def threshold(self) -> float | torch.Tensor:
        """V_th, see :class:`SpikeEncoder`."""
        return self.spikes.threshold

    @torch.no_grad()
    def rest_at(self, levels: torch.Tensor) -> None:
        """Let input channels rest at these levels: what rests there fires nothing, and no output changes.

        Up to rounding to spikes, that is. The weights as they are now count.

        Args:
            levels: ``[in_features]``, in the units of the activations.

        Raises:
            ValueError: inputs are not shifted here, or levels are of another shape or not finite.
        """
        if self.spikes.level is None or self.spikes.constant is None:
            raise ValueError("This projection's inputs are not shifted (shift_inputs).")
        if levels.shape != self.spikes.level.shape:
            raise ValueError(f"Levels {list(self.spikes.level.shape)} are wanted, got {list(levels.shape)}.")
        if not levels.isfinite().all():
            raise ValueError("Levels must be finite.")
        levels = levels.to(self.weight.device, torch.float32)
        self.spikes.level.copy_(levels)
        self.spikes.constant.copy_(self.weight.float() @ levels)

    @property
    def in_features(self) -> int:
        """The width of what the neuron gets."""
        return self.linear.in_features  # type: ignore[return-value]

    @property
    def out_features(self) -> int:
        """The width of what comes out."""
        return self.linear.out_features  # type: ignore[return-value]

    @property
    def weight(self) -> torch.Tensor:
        """``[out_features, in_features]``."""
        return self.linear.weight  # type: ignore[return-value]

    def forward(self, x: torch.Tensor, states: list | None = None) -> torch.Tensor:
        """``[B, L, in_features] -> [B, L, out_features]``; ``states`` as in :class:`SpikeEncoder`."""
        return project(self.linear, self.spikes(x, states))


def spike_fed(model: nn.Module) -> Iterator[tuple[str, SpikingProjection]]:
    """All projections of a model with their names, dense ones too, in the order of the blocks.

    A module with projections says in ``encoders`` which of its linear layers each of its encoders feeds.
    """
    for name, module in model.named_modules():
        if isinstance(module, SpikingProjection):
            yield name, module
        for layer, encoder in getattr(module, "encoders", {}).items():
            path = f"{name}.{layer}" if name else layer
            yield path, SpikingProjection(getattr(module, layer), getattr(module, encoder))
