"""The configuration of a spiking Mamba2: the fields of transformers' ``Mamba2Config``, and its neurons."""

import json
import math
from typing import Any, ClassVar, Literal, get_args

import torch
from huggingface_hub.dataclasses import strict
from spikingjelly.activation_based.base import MemoryModule
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

import neurons
from neurons import compensation
from spiking_mamba.common.keys import reject_unknown_keys
from spiking_mamba.model.membrane import probe

__all__ = [
    "FOLDED",
    "PROJECTIONS",
    "SGC_FUNCTIONS",
    "SGC_MODES",
    "SGC_SCHEDULES",
    "SpikingMambaConfig",
    "own_fields",
]

PROJECTIONS = ("in_proj", "out_proj")
BLOCK_TYPES = ("mamba", "mlp")
Membrane = Literal["token", "sequence"]
MEMBRANES: tuple[str, ...] = get_args(Membrane)
SGC_MODES = compensation.MODES
SGC_FUNCTIONS = tuple(compensation.SMOOTH_FUNCTIONS)
SGC_SCHEDULES = ("constant", "linear", "cosine")
SGC_DEFAULTS = {"function": "scaled_tanh", "lam": 1.0, "schedule": "linear"}


# of a model whose V_th has moved into its weights, or that has no neurons
FOLDED = {"threshold": 1.0, "learn_threshold": False, "sgc": None, "spike_driven": False}
MOST_LAYERS = 100_000  # lists are made of all layers before there are weights to compare with


@strict
class SpikingMambaConfig(PretrainedConfig):
    """Configuration of :class:`~spiking_mamba.SpikingMambaForCausalLM`.

    The fields of ``transformers.Mamba2Config``, of the same meaning, and more.

    Args:
        vocab_size, hidden_size, num_hidden_layers: tokens, width of the residual stream, blocks.
        expand: the mixer is ``expand * hidden_size`` wide, which is ``num_heads * head_dim``.
        state_size, n_groups: states of a head's channel; heads of a group share B and C.
        conv_kernel: taps of the convolution. chunk_size: tokens of one chunk of the scan.
        use_bias, use_conv_bias: of the projections, of the convolution. hidden_act: behind the convolution.
        layer_norm_epsilon: of every norm. residual_in_fp32: keep the residual stream in float32.
        time_step_min, time_step_max, time_step_floor: initial time steps.
        time_step_limit: what they are clamped to. time_step_rank: unused, as in Mamba2.
        initializer_range, rescale_prenorm_residual: initial weights.
        use_cache, tie_word_embeddings, bos_token_id, eos_token_id, pad_token_id: as in transformers.
        neuron: ``None`` for a dense model, or the neuron in front of both projections of every block,
            ``{"class": "neurons.SILIFNode", "args": {"max_spike_count": 8}}`` (see ``neurons.build``).
        sgc: ``None``, or Smoothed Gradient Compensation in training, ``{"mode": "blend" | "gradient" |
            "replace", "function": "tanh" | "scaled_tanh" | "clip" | "identity", "lam": 1.0, "schedule":
            "constant" | "linear" | "cosine"}``; all but the mode have defaults.
        membrane: 'token': every token is a window of its own and the potential starts at 0;
            'sequence': the token axis is the neuron's time axis.
        threshold: V_th, the quantum that one spike stands for: a number > 0, or ``{"in_proj": ..,
            "out_proj": ..}``, or a list with one such entry per layer.
        learn_threshold: make every V_th a trained parameter (its logarithm, float32).
        shift_inputs: let every input channel of a projection rest at a level of its own, a trained parameter,
            at which it is silent; what the levels mean to the outputs is added to them (see
            :mod:`spiking_mamba.model.projection`).
        spike_driven: feed every projection ternary micro-steps and sum them, instead of integers.
        layers_block_type: ``None`` for Mamba2 alone, or a list of "mamba" and "mlp", one a layer, as
            transformers' Nemotron-H names them.
        intermediate_size: width of the gated MLPs, for "mlp" layers.

    Raises:
        TypeError, ValueError: a field has the wrong type or is out of its range.
    """

    model_type = "spiking_mamba"
    auto_map: ClassVar[dict[str, str]] = {}  # trl asks for it, and there is no code in a checkpoint

    num_heads: int = 128
    head_dim: int = 64
    vocab_size: int = 32768
    hidden_size: int = 4096
    state_size: int = 128
    num_hidden_layers: int = 64
    layer_norm_epsilon: float = 1e-5
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    expand: int = 2
    conv_kernel: int = 4
    n_groups: int = 8
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: str = "silu"
    initializer_range: float = 0.02  # Mamba2's 0.1 is too large to train from
    residual_in_fp32: bool = True
    time_step_rank: str | int = "auto"
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: list[float] | tuple[float, ...] = (0.0, math.inf)
    rescale_prenorm_residual: bool = False
    use_cache: bool = True
    chunk_size: int = 256
    tie_word_embeddings: bool = False

    neuron: Any = None
    sgc: Any = None
    membrane: str = "token"
    threshold: Any = 1.0
    learn_threshold: bool = False
    shift_inputs: bool = False
    spike_driven: bool = False
    layers_block_type: list[str] | None = None
    intermediate_size: int | None = None

    def __post_init__(self, **kwargs):
        if isinstance(self.num_hidden_layers, int) and self.num_hidden_layers > MOST_LAYERS:
            raise ValueError(f"num_hidden_layers must be at most {MOST_LAYERS}.")
        if self.time_step_rank == "auto":
            self.time_step_rank = math.ceil(self.hidden_size / 16)
        super().__post_init__(**kwargs)
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be an activation of transformers, got {self.hidden_act!r}.")
        self._check_block_types()
        self._check_neuron()
        self._check_sgc()
        if self.membrane not in MEMBRANES:
            raise ValueError(f"membrane must be one of {MEMBRANES}, got {self.membrane!r}.")
        several = isinstance(self.threshold, list | tuple)  # or one for all layers, however many
        for layer_idx in range(self.num_hidden_layers if several else 1):
            self.layer_threshold(layer_idx)
        if self.spike_driven and self.max_spike_count is None:
            raise ValueError(
                "spike_driven needs a neuron with signed integer spikes, such as neurons.SILIFNode."
            )

    def validate_architecture(self) -> None:
        """Called by transformers whenever it validates a configuration."""
        if self.expand * self.hidden_size != self.num_heads * self.head_dim:
            raise ValueError(
                f"expand * hidden_size ({self.expand * self.hidden_size}) must equal num_heads * head_dim "
                f"({self.num_heads * self.head_dim})."
            )

    @property
    def layer_types(self) -> list[str]:
        """What transformers' cache has to keep for every layer."""
        return ["linear_attention"] * self.num_hidden_layers

    def block_type(self, layer_idx: int) -> str:
        """What a layer's residual block is built around: "mamba" or "mlp"."""
        return "mamba" if self.layers_block_type is None else self.layers_block_type[layer_idx]

    def number_of_blocks(self, kind: str) -> int:
        """How many layers are of this kind, "mamba" or "mlp"."""
        return sum(self.block_type(layer_idx) == kind for layer_idx in range(self.num_hidden_layers))

    def _check_block_types(self) -> None:
        kinds = self.layers_block_type
        if kinds is None:
            if self.intermediate_size is not None:
                raise ValueError(
                    "intermediate_size is the width of MLP layers, and layers_block_type has none."
                )
            return
        for kind in kinds:
            if kind not in BLOCK_TYPES:
                raise ValueError(f"layers_block_type must list {' and '.join(BLOCK_TYPES)}, got {kind!r}.")
        if len(kinds) != self.num_hidden_layers:
            raise ValueError(
                f"layers_block_type lists {len(kinds)} layers, the model has {self.num_hidden_layers}."
            )
        if ("mlp" in kinds) != (self.intermediate_size is not None):
            raise ValueError("MLP layers and intermediate_size, their width, go together: set both or none.")
        if self.intermediate_size is not None and self.intermediate_size < 1:
            raise ValueError(f"intermediate_size must be positive, got {self.intermediate_size}.")

    def _check_neuron(self) -> None:
        if self.neuron is None:
            if self.learn_threshold or self.shift_inputs or self.sgc is not None:
                raise ValueError("learn_threshold, shift_inputs and sgc need a neuron.")
            return
        node = self._prototype
        if not isinstance(node, MemoryModule):
            raise TypeError(f"neuron must be a spikingjelly node, got {self.neuron['class']}.")
        if "m" not in node.supported_step_mode():
            raise ValueError(f"{self.neuron['class']} does not support multi-step mode.")
        probe(json.dumps(self.neuron, sort_keys=True), self.membrane)
        if isinstance(node, neurons.SILIFNode) and node.v_threshold != 1.0:
            raise ValueError(
                f"The neuron's v_threshold is {node.v_threshold}, but inside the model it works at 1: "
                "set the config's threshold instead."
            )

    def _check_sgc(self) -> None:
        if self.sgc is None:
            return
        if not isinstance(self.sgc, dict) or "mode" not in self.sgc:
            raise TypeError(f"sgc must be a mapping with a mode, got {self.sgc!r}.")
        reject_unknown_keys(self.sgc, ("mode", *SGC_DEFAULTS), "sgc")
        self.sgc = {"mode": self.sgc["mode"]} | SGC_DEFAULTS | self.sgc
        choices = {"mode": SGC_MODES, "function": SGC_FUNCTIONS, "schedule": SGC_SCHEDULES}
        for key, allowed in choices.items():
            if self.sgc[key] not in allowed:
                raise ValueError(f"sgc.{key} must be one of {allowed}, got {self.sgc[key]!r}.")
        lam = self.sgc["lam"]
        if isinstance(lam, bool) or not isinstance(lam, int | float):
            raise TypeError(f"sgc.lam must be a number, got {lam!r}.")
        if not 0.0 <= lam <= 1.0:
            raise ValueError(f"sgc.lam must lie in [0, 1], got {lam}.")

    def layer_threshold(self, layer_idx: int) -> dict[str, float]:
        """V_th of both projections of a layer, ``{"in_proj": float, "out_proj": float}``."""
        entry = self.threshold
        if isinstance(entry, list | tuple):
            if len(entry) != self.num_hidden_layers:
                raise ValueError(
                    f"threshold lists {len(entry)} layers, the model has {self.num_hidden_layers}."
                )
            entry = entry[layer_idx]
        if not isinstance(entry, dict):
            entry = dict.fromkeys(PROJECTIONS, entry)
        reject_unknown_keys(entry, PROJECTIONS, "threshold")
        for name in PROJECTIONS:
            value = entry.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"threshold of {name} must be a number, got {value!r}.")
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"threshold of {name} must be finite and positive, got {value}.")
        return {name: float(entry[name]) for name in PROJECTIONS}

    @property
    def _prototype(self) -> MemoryModule | None:
        with torch.device("cpu"):  # whatever the caller's default device is: some read numbers from tensors
            return None if self.neuron is None else neurons.build(self.neuron)  # type: ignore[return-value]

    @property
    def max_spike_count(self) -> int | None:
        """D of a neuron with signed integer spikes, ``None`` for others and for a dense model."""
        return getattr(self._prototype, "max_spike_count", None)

    @property
    def levels(self) -> int | None:
        """How many values a spike count may have; None of a dense model and where the neuron does not say."""
        node = self._prototype
        surrogate = getattr(node, "surrogate_function", None)
        if isinstance(surrogate, neurons.SignedSpikeCount):
            return 2 * surrogate.max_spike_count + 1
        largest = getattr(surrogate, "max_spike_count", None)  # of spikingjelly's, from 0
        return None if largest is None else int(largest) + 1

    @property
    def dead_zone(self) -> float:
        """Up to how many quanta a neuron of integer spikes is silent: half a one where it only rounds."""
        surrogate = getattr(self._prototype, "surrogate_function", None)
        return float(getattr(surrogate, "dead_zone", 0.5))

    @property
    def states_per_neuron(self) -> int:
        """How many states a neuron carries from token to token."""
        return 0 if self._prototype is None or self.membrane == "token" else len(self._prototype._memories)

    @property
    def number_of_conv_states(self) -> int:
        """State slots of one layer of transformers' cache.

        Slot 0 holds convolution and scan, the others the neurons' states, in_proj before out_proj.
        """
        return 1 + len(PROJECTIONS) * self.states_per_neuron


def own_fields(config: SpikingMambaConfig) -> dict[str, Any]:
    """A configuration's fields as another class takes them: without its class's and its writer's own."""
    others = ("model_type", "architectures", "dtype", "transformers_version")
    return {key: value for key, value in config.to_dict().items() if key not in others}
