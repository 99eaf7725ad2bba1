"""A linear projection fed by spikes, with Smoothed Gradient Compensation (SGC) in training."""

import math

import torch
from spikingjelly.activation_based.base import MemoryModule
from torch import nn
from torch.nn import functional as F

import neurons
from neurons.compensation import compensate

__all__ = ["SpikingProjection"]


def _scalar(value: float) -> torch.Tensor:
    """A number that a compiled block takes in, where a Python number would be compiled in; always a true
    float32 on the CPU, even where the model is made on the meta device or in a 16-bit default dtype."""
    return torch.tensor(float(value), dtype=torch.float32, device="cpu")


class SpikingProjection(nn.Linear):
    r"""``y = V_th * W S(x / V_th) + b``: a linear layer fed by spikes, or a plain one without a neuron.

    The weight keeps ``nn.Linear``'s name and shape, so dense checkpoints load unchanged. Spikes are never
    scaled before the product, which therefore consists of accumulations; V_th scales its result.

    Args:
        in_features, out_features, bias: as in ``nn.Linear``.
        neuron: a spikingjelly node at unit threshold, or ``None`` for a dense layer.
        membrane: 'token' (every token starts at V = 0) or 'sequence' (V runs along the token axis).
        threshold: V_th, > 0, in the units of ``x``.
        learn_threshold: train ``log V_th`` as the float32 parameter ``log_threshold``.
        sgc: ``None`` or the complete SGC settings of the config; see :mod:`neurons.compensation`.
        spike_driven: feed the weight ternary micro-steps and sum, instead of integers; without SGC.

    Attributes:
        keeps_spike_size: keep ``spike_size`` in training, for a penalty on it.
        spike_size: ``sum |s|`` over the channels in the last forward pass; float32 ``[B, L]``, in the graph.
        kept_spike_size: see :meth:`keep_spike_size`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        neuron: MemoryModule | None = None,
        membrane: str = "token",
        threshold: float = 1.0,
        learn_threshold: bool = False,
        sgc: dict | None = None,
        spike_driven: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.neuron = neuron
        self.membrane = membrane
        self.keeps_spike_size = False
        self.spike_size: torch.Tensor | None = None
        self.kept_spike_size: torch.Tensor | None = None
        if learn_threshold:
            # of shape [1]: FSDP shards no scalars
            self.log_threshold = nn.Parameter(torch.full((1,), math.log(threshold)))
        self.initial_threshold = threshold
        self.sgc = sgc
        self.sgc_lambda = 0.0 if sgc is None else float(sgc["lam"])
        self.spike_driven = spike_driven

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.neuron is not None:
            text += f", membrane={self.membrane}, threshold={float(self.threshold):.4g}, sgc={self.sgc}"
        return text

    @property
    def threshold(self) -> float | torch.Tensor:
        """V_th: a number, or a float32 tensor ``[1]`` where it is learned."""
        if hasattr(self, "log_threshold"):
            return self.log_threshold.float().exp()
        return self.initial_threshold

    @property
    def initial_threshold(self) -> float:
        """V_th as it was given; it stays so unless it is learned."""
        return self._initial_threshold

    @initial_threshold.setter
    def initial_threshold(self, threshold: float) -> None:
        self._initial_threshold = threshold
        self._unit = threshold == 1.0 and not hasattr(self, "log_threshold")
        self._fixed = _scalar(threshold)

    @property
    def sgc_lambda(self) -> float:
        """SGC's lambda now; 0 switches the path off."""
        return self._sgc_lambda

    @sgc_lambda.setter
    def sgc_lambda(self, lam: float) -> None:
        self._sgc_lambda = float(lam)
        self._compensates = self.sgc is not None and lam > 0.0
        self._lam = _scalar(lam)

    @property
    def max_spike_count(self) -> int:
        """``D`` of the neuron; 1 for one that does not say."""
        surrogate = getattr(self.neuron, "surrogate_function", None)
        return int(getattr(self.neuron, "max_spike_count", getattr(surrogate, "max_spike_count", 1)))

    def spikes(self, u: torch.Tensor, states: list | None = None) -> torch.Tensor:
        """Drive the neuron over a batch of sequences.

        The neuron's state belongs to the caller: it goes in, comes out, and is reset, so that nothing is
        left in the module whatever order a checkpointed backward pass recomputes in.

        Args:
            u: input in units of V_th, shape ``[B, L, in_features]``.
            states: the neuron's states after the previous token, each ``[B, in_features]``, or an empty
                list for a fresh sequence; replaced by the states after the last token.

        Returns:
            Spikes ``[B, L, in_features]``.
        """
        node = self.neuron
        assert node is not None, "a dense projection has no spikes"
        if self._stateless:
            node.stateless = True
            return node(u.unsqueeze(0))[0]
        step_mode = node.step_mode
        node.step_mode = "m"
        try:
            if self.membrane == "token":
                return node(u.unsqueeze(0))[0]
            if states:
                node._memories.update(zip(node._memories, states, strict=True))
            spike = node(u.transpose(0, 1)).transpose(0, 1)
            if states is not None:
                states[:] = node._memories.values()
            return spike
        finally:
            node.reset()
            node.step_mode = step_mode

    @property
    def _stateless(self) -> bool:
        """Whether the node works without a potential: nobody will ask for it, every token being a window."""
        return self.membrane == "token" and isinstance(self.neuron, neurons.SILIFNode)

    def keep_spike_size(self) -> None:
        """Keep the size of the first pass. Gradient checkpointing calls again in the backward pass, and to
        hold a tensor from there would hold the whole block's recomputed activations."""
        if self.kept_spike_size is None:
            self.kept_spike_size = self.spike_size
        self.spike_size = None

    def _compensated(self, u: torch.Tensor, states: list | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The spikes, and these with SGC's smooth path mixed in, each ``[B, L, in_features]``."""
        assert self.sgc is not None
        mode, function = self.sgc["mode"], self.sgc["function"]
        compiling = torch.compiler.is_compiling()
        if compiling or not self._stateless:
            lam = self._lam if compiling else self.sgc_lambda
            spike = self.spikes(u, states)
            return spike, compensate(u, spike, mode, function, lam, self.max_spike_count)
        node = self.neuron
        node.compensation = mode, function, self.sgc_lambda
        try:
            return self.spikes(u), node.compensated[0]
        finally:
            node.compensation = node.compensated = None

    def forward(self, x: torch.Tensor, states: list | None = None) -> torch.Tensor:
        """Project ``x`` of shape ``[B, L, in_features]`` to ``[B, L, out_features]``; ``states`` as in
        :meth:`spikes`."""
        if self.neuron is None:
            return super().forward(x)
        compiles = torch.compiler.is_compiling() and not hasattr(self, "log_threshold")
        threshold = self._fixed if compiles else self.threshold
        u = x if self._unit else x.float() / threshold
        if self._compensates and self.training and not self.spike_driven:
            emitted, spike = self._compensated(u, states)
        else:
            emitted = spike = self.spikes(u, states)
        if self.keeps_spike_size and self.training:
            self.spike_size = emitted.abs().sum(-1, dtype=torch.float32)
        if not torch.is_autocast_enabled(x.device.type):
            spike = spike.to(self.weight.dtype)
        y = self._accumulate(spike)
        y = y if self._unit else (y * threshold).to(y.dtype)
        return y if self.bias is None else y + self.bias

    def _accumulate(self, spike: torch.Tensor) -> torch.Tensor:
        if not self.spike_driven:
            return F.linear(spike, self.weight)
        slots = self.max_spike_count
        ternary = neurons.SignedCountToTernary(slots)(spike.unsqueeze(0))  # [D, B, L, in]
        return neurons.MicroStepSum(slots)(F.linear(ternary, self.weight))[0]
