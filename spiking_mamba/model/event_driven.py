"""A copy of a model for inference with integer weights, fetched where a spike asks for them.

1 / V_th moves into the norm before each neuron, V_th and the weights' scale become one float an output, and
what is left of a projection is ``y = scale * sum of integers``, and a bias. Where inputs are shifted, the
levels are subtracted before the neuron, and what they mean to the outputs is in the bias. A dense model goes
the same way with its activations rounded to int8 in blocks of 32.
"""

import copy
import functools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import nn

import neurons
from neurons.backend import check_cupy, check_numba
from neurons.event_linear import LARGEST_BATCH, EventDrivenLinear
from spiking_mamba.model.by_hand import set_by_hand
from spiking_mamba.model.cache import Cache, SpikingMambaCausalLMOutput, takes_any_cache_name
from spiking_mamba.model.compiled import emits_int8
from spiking_mamba.model.configuration import FOLDED, PROJECTIONS, SpikingMambaConfig, own_fields
from spiking_mamba.model.cuda.token import FusedTokens, cannot_fuse, own_cache
from spiking_mamba.model.decoding import DecodingGraphs
from spiking_mamba.model.graph_generation import settings
from spiking_mamba.model.mlp import SpikingMambaMLP
from spiking_mamba.model.modeling import SpikingMambaForCausalLM
from spiking_mamba.model.projection import reject_wrapped, spike_fed
from spiking_mamba.model.quantised import QuantisedLinear
from spiking_mamba.model.rounding_cost import rounded_layers

__all__ = ["EventDrivenMambaConfig", "EventDrivenMambaForCausalLM", "event_driven"]

WEIGHTS = ("int8", "int4")
STATES = ("float32", "bfloat16")
DECODING = ("auto", "compiled", "torch")
FUSED_DEVICES = ("cuda",)  # whose single tokens have kernels; the tests, which run these, add the CPU


@strict
class EventDrivenMambaConfig(SpikingMambaConfig):
    """Configuration of :class:`EventDrivenMambaForCausalLM`: that of the model it was made of, and more.

    Args:
        weights: 'int8' or 'int4', of projections and head.
        int8_layers: names of those that are int8 whatever ``weights`` says; None: none.
        states: dtype in which compiled tokens keep the scan's states, 'float32' or 'bfloat16'.

    Raises:
        ValueError: a field is out of its range, or the neuron's spikes are no integers of int8.
    """

    model_type = "event_driven_mamba"

    weights: str = "int8"
    int8_layers: list[str] | None = None
    states: str = "float32"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights must be one of {WEIGHTS}, got {self.weights!r}.")
        if self.states not in STATES:
            raise ValueError(f"states must be one of {STATES}, got {self.states!r}.")
        if self.neuron is not None:
            _check_neuron(neurons.build(self.neuron), self.membrane)


def _check_neuron(node: nn.Module, membrane: str) -> None:
    if membrane != "token" or not isinstance(node, neurons.SILIFNode) or isinstance(node, neurons.TILIFNode):
        raise ValueError(
            "An event-driven model needs neurons.SILIFNode with membrane='token', whose spikes are integers "
            f"that no earlier token changes; this one has {type(node).__name__}, membrane={membrane!r}. Its "
            "own generate() decodes it."
        )
    if not getattr(node.surrogate_function, "spiking", True):
        raise ValueError("The neuron's surrogate emits no spikes: spiking=False.")
    if node.max_spike_count > 127:
        raise ValueError(f"max_spike_count={node.max_spike_count} does not fit in int8; at most 127 does.")


class EventDrivenMambaForCausalLM(SpikingMambaForCausalLM):
    """A language model for inference; made by :func:`event_driven` or loaded, never trained.

    Embeddings, norms, convolution and scan are float32; projections and head are integers. On a processor,
    ``generate()`` decodes one sequence, greedily or sampling, by compiled code; on CUDA, where CuPy is, every
    single token of up to eight sequences that follows others is a graph of few kernels, in ``generate()``, in
    streams and in loops of one's own. See :meth:`set_decoding`.
    """

    config_class = EventDrivenMambaConfig
    _tied_weights_keys = None  # type: ignore[assignment]  # transformers' own default

    def __init__(self, config: EventDrivenMambaConfig) -> None:
        super().__init__(config)
        layer = QuantisedLinear if config.neuron is None else EventDrivenLinear
        forms = dict.fromkeys(config.int8_layers or (), "int8")
        for name, projection in list(spike_fed(self)):
            linear = cast(nn.Linear, projection.linear)
            size = linear.in_features, linear.out_features
            projection.spikes.constant = None  # it is in the bias
            biased = linear.bias is not None or config.shift_inputs
            made = layer(*size, biased, forms.pop(name, config.weights))
            self.set_submodule(name, made)
        form = forms.pop("lm_head", config.weights)
        self.lm_head = QuantisedLinear(config.hidden_size, config.vocab_size, False, form)
        if forms:
            raise ValueError(f"int8_layers names what is no projection and no head: {', '.join(forms)}.")
        self.requires_grad_(False)
        self._fused = FusedTokens()
        self.set_decoding("auto")

    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, EventDrivenLinear):
            super()._init_weights(module)

    def _head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden_states)

    def get_output_embeddings(self) -> None:
        """None: there are no embeddings of floats behind the head to resize or to tie."""
        return None

    def train(self, mode: bool = True) -> "EventDrivenMambaForCausalLM":
        """Only for inference.

        Raises:
            ValueError: ``mode`` is true.
        """
        if mode:
            raise ValueError("An event-driven model is for inference: train the model it was made of.")
        return super().train(False)

    def set_decoding(self, decoding: str, threads: int | None = None) -> None:
        """Choose what ``generate()`` does with the tokens behind the prompt.

        Args:
            decoding: 'compiled': one call of compiled code a token, by numba, or on CUDA by CuPy; a call that
                cannot go that way raises, and so does this one where that package is missing. 'torch': as any
                model. 'auto': compiled where it can be: on a processor, one sequence, greedy or sampling; on
                CUDA, up to eight sequences.
            threads: of compiled code on a processor; None: torch's number of threads, at most that of the
                cores.

        Raises:
            ValueError: ``decoding`` is none of these, or ``threads`` less than 1.
            RuntimeError: numba or CuPy is missing.
        """
        if decoding not in DECODING:
            raise ValueError(f"decoding must be one of {DECODING}, got {decoding!r}.")
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}.")
        if decoding == "compiled":
            (check_cupy if self._on_cuda else check_numba)()
        self._decoding = decoding, threads
        self._decoders: Any = None
        self._settled: object = None
        self._settle()

    def _apply(self, fn, recurse=True):
        moved = super()._apply(fn, recurse)
        self._settle()
        return moved

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module; graphs that were captured hold copies of weights and are captured anew."""
        loaded = super().load_state_dict(*args, **kwargs)
        self._settled = None
        self._settle()
        return loaded

    def _settle(self) -> None:
        """Let the device that the model is on now run it: its projections' backend, and single tokens."""
        device, (decoding, _), reason = self.device, self._decoding, self._cannot_fuse()
        fed: list[Any] = [(p.linear, emits_int8(p)) for _, p in spike_fed(self)] if self._on_cuda else []
        now = device, self.dtype, decoding, reason, [known for _, known in fed]
        if self._settled == now:
            return
        for layer, known in fed:
            layer.trusts_spikes = known
        if self._on_cuda:
            self.set_weights_backend("cupy" if _has(check_cupy) else "torch")
        elif self.lm_head.backend == "cupy":
            self.set_weights_backend("torch")
        if reason is None and decoding != "torch":
            self.graphs = DecodingGraphs(self._fused_token, self.backbone.layers, self._own_cache)
        elif self._fuses:
            self.graphs = None
        self._settled = now

    @property
    def _on_cuda(self) -> bool:
        return self.device.type in FUSED_DEVICES

    @property
    def _fuses(self) -> bool:
        """Whether single tokens go through CUDA's kernels."""
        return self.graphs is not None and self.graphs.step == self._fused_token

    def _cannot_fuse(self) -> str | None:
        """Why no single token can go through CUDA's kernels; None where they can."""
        if not self._on_cuda:
            return f"The model is on {self.device}."
        if not _has(check_cupy):
            return "CuPy is missing."
        return cannot_fuse(self)

    def _fused_token(self, input_ids: torch.Tensor, cache: Cache) -> torch.Tensor:
        return self._fused(self, input_ids, cache)

    def _own_cache(self, cache: Cache) -> Cache:
        return own_cache(cache, getattr(torch, self.config.states))

    def capture_decoding(self, captures: bool = True) -> None:
        """As any model's, where its single tokens do not go through kernels of their own."""
        if captures and self._cannot_fuse() is None and self._decoding[0] != "torch":
            self._settled = None
            self._settle()
        else:
            super().capture_decoding(captures)

    def _captured(
        self, input_ids: torch.Tensor | None, cache: Cache | None, use_cache: bool | None
    ) -> SpikingMambaCausalLMOutput | None:
        if self._fuses and input_ids is not None and input_ids.shape[0] > LARGEST_BATCH:
            return None
        return super()._captured(input_ids, cache, use_cache)

    @property
    def decoders(self) -> Any:
        """The :class:`~spiking_mamba.model.cpu_generation.Decoders` where compiled code runs.

        None before its first token.
        """
        return self._decoders

    @takes_any_cache_name
    def generate(self, *args: Any, cache: Cache | None = None, **kwargs: Any) -> Any:
        """As in transformers; ``cache`` holds the tokens before ``input_ids``, under any of its names.

        Raises:
            ValueError: decoding is 'compiled', and these arguments cannot be.
        """
        decoding, threads = self._decoding
        self._settle()  # it may have been loaded to where it is
        if self._on_cuda:
            reason = self._cannot_fuse() or self._cannot_generate(args, kwargs)
            if decoding == "compiled" and reason is not None:
                raise ValueError(f"decoding='compiled': {reason}")
        elif decoding != "torch" and "custom_generate" not in kwargs and self._has_numba(decoding):
            from spiking_mamba.model.cpu_generation import Decoders, cannot_generate, decode

            reason = cannot_generate(self, args, kwargs)
            if reason is None:
                if self._decoders is None:
                    self._decoders = Decoders(threads)
                # transformers does not hand it on to a loop that is passed
                loop = functools.partial(decode, self._decoders, streamer=kwargs.get("streamer"))
                kwargs["custom_generate"] = loop
            elif decoding == "compiled":
                raise ValueError(f"decoding='compiled': {reason}")
        named = {} if cache is None else {"cache": cache}
        return super().generate(*args, **named, **kwargs)

    @staticmethod
    def _has_numba(decoding: str) -> bool:
        if decoding == "compiled":
            check_numba()
        return _has(check_numba)

    def _cannot_generate(self, args: tuple, kwargs: dict[str, Any]) -> str | None:
        """Why the tokens of a call of ``generate()`` cannot go through CUDA's kernels."""
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        asked = settings(self, kwargs)
        rows = (1 if ids is None else ids.shape[0]) * max(
            asked.num_beams or 1, asked.num_return_sequences or 1
        )
        if rows > LARGEST_BATCH:
            return f"At most {LARGEST_BATCH} sequences at a time are compiled, not {rows}."
        if any(module._forward_hooks or module._forward_pre_hooks for module in self.modules()):
            return "Somebody watches the model by forward hooks, which compiled code has not."
        return None

    def set_weights_backend(self, backend: str) -> None:
        """Choose what runs projections, see :class:`neurons.EventDrivenLinear`.

        On CUDA it is 'cupy' where that is installed.
        """
        neurons.set_backend(self, backend, instance=EventDrivenLinear)


def _has(check: Callable[[], None]) -> bool:
    try:
        check()
    except RuntimeError:
        return False
    return True


def event_driven(
    model: SpikingMambaForCausalLM,
    weights: str = "int8",
    states: str = "float32",
    calibration: torch.Tensor | None = None,
    tolerance: float | None = None,
) -> EventDrivenMambaForCausalLM:
    """A copy of ``model`` for inference, in float32 but for projections and head, which become integers.

    Args:
        model: spiking, with signed integer spikes that fit in int8, or dense.
        weights: 'int8' with a scale an output, or 'int4' with one for every 32 inputs of an output.
        states: dtype of the scan's states in compiled tokens.
        calibration: for int4, tokens of text like that which the model will meet, int64 ``[rows, length]``:
            each layer's weights are rounded for what it gets there. Meanwhile a layer of ``in`` inputs takes
            ``in * in`` floats.
        tolerance: with ``calibration``, by how much perplexity may grow, 0.01 for 1%, as estimated on that
            text (:mod:`spiking_mamba.model.rounding_cost`): layers that cost most for the bytes they save
            become int8, until what is left is estimated to cost no more; None makes none int8.

    Raises:
        TypeError: ``model`` is no model of this package, such as a folder's name.
        ValueError: it is event-driven already; the neuron's spikes are no integers of int8, or projections
            have different ones; an argument is none of those named; an adapter is not merged.
    """
    _check_source(model)
    if calibration is not None and (weights != "int4" or calibration.ndim != 2 or not calibration.numel()):
        raise ValueError("calibration is [rows, length] of tokens, not empty, and for weights='int4' alone.")
    if tolerance is not None and (calibration is None or not 0 <= tolerance < math.inf):
        raise ValueError("tolerance is at least 0 and finite, and wants the text of a calibration.")
    own = {"weights": weights, "states": states, "tie_word_embeddings": False}
    fields = own_fields(model.config) | set_by_hand(model, model.config) | FOLDED | own
    EventDrivenMambaConfig.from_dict(fields)  # refuses what cannot be, before anything takes long
    rounded = rounded_layers(model, weights, calibration, tolerance)
    wide = [name for name, layer in rounded.items() if layer.weights != weights]
    config = EventDrivenMambaConfig.from_dict(fields | {"int8_layers": wide or None})
    made = EventDrivenMambaForCausalLM(config).to(model.device)
    kept = {
        name: tensor.float()
        for name, tensor in model.state_dict().items()
        if not any(f"{projection}." in name for projection in PROJECTIONS)
        and not name.endswith(("log_threshold", "level", "constant"))
        and not name.startswith("lm_head.")
    }
    made.load_state_dict(kept, strict=False)
    with torch.no_grad():
        for k, (block, source) in enumerate(zip(made.backbone.blocks, model.backbone.blocks, strict=True)):
            _fill_block(block, source, {n: rounded[f"backbone.layers.{k}.mixer.{n}"] for n in PROJECTIONS})
        _fill(made.lm_head, rounded["lm_head"], 1.0)
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.eval()


def _fill_block(block: Any, source: Any, rounded: dict[str, Any]) -> None:
    """Put a block's rounded projections in, V_th folded into what stands before and behind each."""
    for (name, projection), (_, layer) in zip(spike_fed(source.mixer), spike_fed(block.mixer), strict=True):
        threshold = torch.as_tensor(projection.threshold).item()
        _fill(getattr(block.mixer, name), rounded[name], threshold, projection.spikes.constant)
        if layer.spikes.level is not None:
            layer.spikes.level.copy_(torch.as_tensor(projection.spikes.shift))
        if name == "out_proj" and isinstance(block.mixer, SpikingMambaMLP):
            _divide_upper_half(block.mixer.in_proj, threshold)
        else:
            block.divide_before(name, threshold)


def _check_source(model: Any) -> None:
    if isinstance(model, nn.Module):
        reject_wrapped(model)
    if not isinstance(model, SpikingMambaForCausalLM):
        raise TypeError(
            f"event_driven takes a SpikingMambaForCausalLM, got {type(model).__name__}; "
            "spiking_mamba.model.checkpoint.load_model loads one from a folder."
        )
    if isinstance(model, EventDrivenMambaForCausalLM):
        raise ValueError(f"The model is event-driven already, with weights={model.config.weights!r}.")


def _divide_upper_half(in_proj: nn.Module, threshold: float) -> None:
    """Bring V_th into an MLP's input projection, of which what its second neuron gets comes straight."""
    for tensor in (in_proj.scale, in_proj.bias):
        if tensor is not None:
            cast(torch.Tensor, tensor).chunk(2)[1].div_(threshold)


def _fill(
    layer: EventDrivenLinear,
    rounded: EventDrivenLinear,
    threshold: float,
    constant: torch.Tensor | None = None,
) -> None:
    """Put rounded weights into a layer of their form; V_th goes into the scale, a constant into the bias."""
    if not 0 < threshold < math.inf:
        raise ValueError(f"A threshold must be finite and positive, got {threshold}.")
    rounded.scale *= threshold
    if constant is not None:
        rounded.bias = constant.float() + (0.0 if rounded.bias is None else rounded.bias)
    layer.load_state_dict(rounded.state_dict())
