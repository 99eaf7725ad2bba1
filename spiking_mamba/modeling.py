"""A Mamba2 language model whose two projections per block are fed by spikes.

One explicit-state core with two skins. transformers': ``generate()`` and ``cache``. spikingjelly's:
``functional.set_step_mode(model, "s")``, one token a call, ``functional.reset_net(model)`` between
sequences. A dense Mamba2 is the same model with ``config.neuron = None``.
"""

import copy
import math
import re
from typing import Any, ClassVar

import torch
from spikingjelly.activation_based.base import MemoryModule
from torch import nn
from transformers import GenerationMixin, Mamba2ForCausalLM, PreTrainedModel
from transformers import initialization as init

import neurons

from . import cache as caches
from .blocks import SpikingMambaBlock, SpikingMambaMixer
from .cache import Cache, SpikingMambaCausalLMOutput, SpikingMambaOutput, takes_any_cache_name
from .checkpoint import load_dense
from .configuration import SpikingMambaConfig
from .decoding import DecodingGraphs
from .norms import RMSNorm
from .projection import SpikingProjection

__all__ = ["SpikingMambaForCausalLM", "SpikingMambaModel", "spike_driven"]


class Stream(MemoryModule):
    """The state of a sequence fed token by token in step mode 's': the model's cache as a memory, which
    ``functional.reset_net`` forgets."""

    def __init__(self) -> None:
        super().__init__()
        self.step_mode = "m"
        self.register_memory("cache", None)

    def detach(self) -> None:
        """Cut the cached states, in place, from the graph of the tokens before."""
        for states, key in () if self.cache is None else caches.tensors(self.cache):
            states[key].detach_()

    def _apply(self, fn):
        self.reset()  # a sequence does not survive a move to another device or dtype
        return super()._apply(fn)


def _same(one: nn.Module | None, other: nn.Module | None) -> bool:
    """Whether two nodes are alike, but for the step mode and the backend they are in at the moment."""
    if one is not None and any(True for _ in one.parameters()):
        return True  # what such a node prints moves as it is trained; its class is compared elsewhere
    texts = [re.sub(r"(step_mode|backend)=\w+", "", repr(node)) for node in (one, other)]
    return texts[0] == texts[1]


class SpikingMambaPreTrainedModel(PreTrainedModel):
    """Weights, initialisation and loading of the spiking Mamba2."""

    config_class = SpikingMambaConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["SpikingMambaBlock"]
    _keep_in_fp32_modules_strict: ClassVar = {"log_threshold"}
    _is_stateful = True  # no way back from a state: generate() refuses what would crop it

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Mamba2's initial values, but thresholds as configured."""
        super()._init_weights(module)
        if isinstance(module, SpikingMambaMixer):
            module.initialise(self.config, torch.rand(module.num_heads, device=module.dt_bias.device))
            init.kaiming_uniform_(module.conv1d.weight, a=math.sqrt(5))
            if module.conv1d.bias is not None:
                init.zeros_(module.conv1d.bias)
            init.kaiming_uniform_(module.out_proj.weight, a=math.sqrt(5))
            if self.config.rescale_prenorm_residual:  # as GPT-2: the residual stream sums as many of them
                module.out_proj.weight /= math.sqrt(self.config.num_hidden_layers)
        if isinstance(module, SpikingProjection) and hasattr(module, "log_threshold"):
            init.constant_(module.log_threshold, math.log(module.initial_threshold))

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; a neuron that was swapped by hand goes into the configuration first.

        Raises:
            ValueError: the projections have different neurons, for which the configuration has one place.
            TypeError: the neuron cannot be described, see ``neurons.spec_of``.
        """
        nodes = [module.neuron for module in self.modules() if isinstance(module, SpikingProjection)]
        if nodes:
            own = None if self.config.neuron is None else neurons.build(self.config.neuron)
            if any(type(node) is not type(nodes[0]) or not _same(node, nodes[0]) for node in nodes):
                raise ValueError("The projections have different neurons; a configuration holds one for all.")
            if type(nodes[0]) is not type(own) or not _same(nodes[0], own):
                self.config.neuron = None if nodes[0] is None else neurons.spec_of(nodes[0])
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any):
        """As in transformers, but a checkpoint that lacks or adds a weight is an error, not a warning.

        Raises:
            ValueError: a key is missing or unexpected, or a shape disagrees with the config.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        problems = {
            key: sorted(map(str, info[key]))
            for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
            if info.get(key)
        }
        if problems:
            raise ValueError(
                "The checkpoint does not fit its configuration: "
                + "; ".join(f"{k.replace('_', ' ')}: {', '.join(v[:5])}" for k, v in problems.items())
            )
        return (model, info) if output_loading_info else model


class SpikingMambaModel(SpikingMambaPreTrainedModel):
    """The backbone: embeddings, blocks and the last norm."""

    def __init__(self, config: SpikingMambaConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(SpikingMambaBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.stream = Stream()
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    @takes_any_cache_name
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple | SpikingMambaOutput:
        """A batch of sequences, or their next tokens behind those that a cache has seen.

        In step mode 's' the call continues the sequence of the calls before it, unless the model trains, a
        cache is passed, or ``use_cache=False`` asks for no state. Streams are for inference, under
        ``torch.no_grad()``: their states move on in place.

        Args:
            input_ids: ``[B, L]`` token ids. inputs_embeds: ``[B, L, hidden_size]`` instead of them.
            cache: states of the tokens before these; they move on. Also called ``cache_params`` and
                ``past_key_values``.
            use_cache: return a cache, a new one where none is passed; by default as the configuration says,
                and not in training.
            output_hidden_states: return the residual stream behind every block.
            return_dict: false for a tuple.
            attention_mask: ``[B, L]``, or longer by what the cache has seen; 1 for tokens, 0 for padding.

        Raises:
            ValueError: neither ids nor embeddings are given, or both; a token id lies outside the vocabulary
                (checked on the CPU); the batch size has changed in the midst of a stream; a cache is passed
                in training with gradient checkpointing, which would run every block twice on it.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either input_ids or inputs_embeds.")
        self._check_ids(input_ids)
        streaming = self.streams(cache, use_cache)
        if streaming:
            cache = self._stream_cache((input_ids if inputs_embeds is None else inputs_embeds).shape[0])
        if use_cache is None:
            use_cache = streaming or (self.config.use_cache and not self.training)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if cache is not None:
                raise ValueError("Gradient checkpointing would move a cache on twice: pass none in training.")
            use_cache = False
        if use_cache and cache is None:
            cache = caches.new_cache(self.config)

        hidden_states = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        mask = _local_mask(attention_mask, hidden_states.shape[1])
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        kept: tuple[torch.Tensor, ...] = ()
        for block in self.layers:
            hidden_states = block(hidden_states, cache=cache, attention_mask=mask)
            if output_hidden_states:
                kept += (hidden_states,)
        hidden_states = self.norm_f(hidden_states)
        if streaming:
            self.stream.cache = cache

        all_states = (*kept, hidden_states) if output_hidden_states else None
        cache = cache if use_cache else None
        if not (self.config.return_dict if return_dict is None else return_dict):
            return tuple(value for value in (hidden_states, cache, all_states) if value is not None)
        named = {caches.OUTPUT_NAME: cache}
        return SpikingMambaOutput(last_hidden_state=hidden_states, hidden_states=all_states, **named)

    def _check_ids(self, input_ids: torch.Tensor | None) -> None:
        if input_ids is None or input_ids.device.type != "cpu" or torch.compiler.is_compiling():
            return
        vocabulary = self.embeddings.num_embeddings
        if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < vocabulary:
            raise ValueError(
                f"input_ids reach from {int(input_ids.min())} to {int(input_ids.max())}, "
                f"outside the vocabulary of {vocabulary}."
            )

    def streams(self, cache: Cache | None, use_cache: bool | None) -> bool:
        """Whether a call with these arguments continues the sequence of the calls before it."""
        asked = self.stream.step_mode == "s" and cache is None and use_cache is not False
        return asked and not self.training

    def one_token(self, input_ids: torch.Tensor, cache: Cache) -> torch.Tensor:
        """``[B, 1] -> [B, 1, hidden_size]`` with a cache that has states; they move on in place."""
        hidden_states = self.embeddings(input_ids)
        for block in self.layers:
            hidden_states = block.step(hidden_states, cache)
        return self.norm_f(hidden_states)

    def _stream_cache(self, batch: int) -> Cache:
        cache = self.stream.cache
        if cache is None:
            return caches.new_cache(self.config)
        if (held := caches.batch_size(cache)) not in (None, batch):
            raise ValueError(
                f"The stream holds {held} sequences, this call has {batch}: "
                "call functional.reset_net(model) between sequences."
            )
        return cache


def _local_mask(attention_mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """The mask ``[B, L]`` of these tokens, out of one that covers a cache's past too; None: all are real.

    A single token is never padding: ``generate()`` keeps the mask of the prompt.
    """
    if attention_mask is None or length == 1:
        return None
    if not torch.compiler.is_compiling() and bool((attention_mask == 1).all()):
        return None
    return attention_mask[:, -length:].contiguous()


def _positions_to_keep(hidden_states: torch.Tensor, which: int | torch.Tensor) -> torch.Tensor:
    """``[B, L, C]`` at the last ``which`` positions (0: all), or at those that a tensor of indices names: one
    list for all rows ``[n]``, or one for each ``[B, n]``."""
    if isinstance(which, int):
        return hidden_states[:, -which:] if which else hidden_states
    if which.ndim == 2:
        return torch.take_along_dim(hidden_states, which[..., None], dim=1)
    return hidden_states[:, which]


class SpikingMambaForCausalLM(SpikingMambaPreTrainedModel, GenerationMixin):
    """The language model; ``config.neuron = None`` makes it a dense Mamba2."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "backbone.embeddings.weight"}

    def __init__(self, config: SpikingMambaConfig) -> None:
        super().__init__(config)
        self.backbone = SpikingMambaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.graphs: DecodingGraphs | None = None
        self.post_init()

    def _apply(self, fn, recurse=True):
        if self.graphs is not None:  # they read the tensors that are about to move
            self.capture_decoding()
        return super()._apply(fn, recurse)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.embeddings = value

    @takes_any_cache_name
    def generate(self, *args: Any, cache: Cache | None = None, **kwargs: Any) -> Any:
        """As in transformers; ``cache`` holds the tokens before ``input_ids``, under any of its names."""
        named = {} if cache is None else {caches.GENERATION_NAME: cache}
        return super().generate(*args, **named, **kwargs)

    @takes_any_cache_name
    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        *args: Any,
        cache: Cache | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Arguments of the next forward pass of ``generate()``."""
        # it would make masks for attention from a cache
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, is_first_iteration=is_first_iteration, **kwargs
        )
        return inputs | {"cache": cache}

    @takes_any_cache_name
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: Cache | None = None,
        labels: torch.LongTensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> tuple | SpikingMambaCausalLMOutput:
        """Next-token logits, and their loss where labels are given.

        Args:
            labels: ``[B, L]``, the tokens themselves, shifted in here; -100 is ignored.
            logits_to_keep: positions whose logits are wanted: the last so many, 0 for all, or a tensor of
                indices ``[n]`` or ``[B, n]``.
            input_ids, inputs_embeds, cache, output_hidden_states, return_dict, use_cache, attention_mask: see
                :meth:`SpikingMambaModel.forward`.
            kwargs: of the loss, as ``num_items_in_batch``.

        Returns:
            Logits ``[B, L, vocab_size]`` in float32, and the mean cross-entropy.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if self.graphs is not None and labels is None and not output_hidden_states and return_dict:
            logits, moved = self._captured(input_ids, cache, use_cache)
            if logits is not None:
                return SpikingMambaCausalLMOutput(logits=logits, **{caches.OUTPUT_NAME: moved})
        output = self.backbone(
            input_ids,
            inputs_embeds=inputs_embeds,
            cache=cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            attention_mask=attention_mask,
        )
        hidden_states = _positions_to_keep(output.last_hidden_state, logits_to_keep)
        logits = self._head(hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        if not return_dict:
            values = loss, logits, output.cache, output.hidden_states
            return tuple(value for value in values if value is not None)
        return SpikingMambaCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            **{caches.OUTPUT_NAME: output.cache},
        )

    def _head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden_states.to(self.lm_head.weight.dtype)).float()

    def _captured(
        self, input_ids: torch.Tensor | None, cache: Cache | None, use_cache: bool | None
    ) -> tuple[torch.Tensor | None, Cache | None]:
        """One more token's logits by a graph, and the cache; None twice where something else is asked for."""
        if self.backbone.streams(cache, use_cache):
            cache = self.backbone.stream.cache
        goes = (
            cache is not None
            and input_ids is not None
            and input_ids.shape[1] == 1
            and not self.training
            and not torch.is_grad_enabled()
            and caches.batch_size(cache) == input_ids.shape[0]
        )
        return (self.graphs(input_ids, cache), cache) if goes else (None, None)

    def _one_token(self, input_ids: torch.Tensor, cache: Cache) -> torch.Tensor:
        return self._head(self.backbone.one_token(input_ids, cache))

    def projections(self) -> dict[str, SpikingProjection]:
        """All spiking projections by module name, ``backbone.layers.0.mixer.in_proj`` and so on."""
        return {
            name: module
            for name, module in self.named_modules()
            if isinstance(module, SpikingProjection) and module.neuron is not None
        }

    @property
    def compiles(self) -> bool:
        """Whether the blocks go through ``torch.compile``."""
        return self.backbone.layers[0].compiles

    def compile_blocks(self, compiles: bool = True) -> None:
        """Run the blocks through ``torch.compile`` wherever no cache is used.

        The first step takes a minute longer; what is compiled serves all blocks. Norms, convolution, gates
        and neurons with ``backend='torch'`` then fuse into few kernels; rounding to a 16-bit dtype before a
        neuron may be left out, so that a spike at a tie comes out one quantum apart. Blocks that somebody
        watches by forward hooks, as ``count_spikes`` does, run uncompiled meanwhile.
        """
        for block in self.backbone.layers:
            block.compiles = compiles

    def capture_decoding(self, captures: bool = True) -> None:
        """Decode by compiled blocks and, on CUDA, as one CUDA graph a batch size.

        For ``generate()`` and for streaming in step mode 's', under ``torch.no_grad()``: whenever one token
        follows others. The first such step compiles and captures for half a minute. What the graphs hold is
        made anew after neurons are swapped or the model moves to another device or dtype. Modules that
        somebody watches by hooks run uncaptured meanwhile.
        """
        self.graphs = DecodingGraphs(self._one_token, self.backbone.layers) if captures else None

    def keep_spike_sizes(self, keeps: bool = True) -> None:
        """Let every projection keep its spikes' size in the next forward pass in training, for
        :meth:`mean_spike_size`; to be called before each, for what is kept stays."""
        for projection in self.projections().values():
            projection.keeps_spike_size, projection.kept_spike_size = keeps, None

    def mean_spike_size(self, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Mean ``|s|`` of the last forward pass in training, weighted by output width as in
        ``SpikeCounts.mean_abs``; a float32 scalar with the surrogate's gradient.

        Args:
            mask: ``[B, L]`` bool, which tokens count; None: all.

        Raises:
            RuntimeError: the sizes were not kept, or kept without a graph, as under reentrant gradient
                checkpointing.
        """
        projections = self.projections().values()
        if any(projection.kept_spike_size is None for projection in projections) or not projections:
            raise RuntimeError("No spike sizes: call keep_spike_sizes() before a forward pass in training.")
        if torch.is_grad_enabled() and not all(p.kept_spike_size.requires_grad for p in projections):
            raise RuntimeError(
                "The spike sizes have no gradient: reentrant gradient checkpointing cannot give one; use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        total = sum(p.kept_spike_size * p.out_features for p in projections)  # [B, L]
        weight = sum(p.in_features * p.out_features for p in projections)
        if mask is None:
            return total.mean() / weight
        return (total * mask).sum() / mask.sum().clamp(min=1) / weight

    @property
    def sgc_lambda(self) -> float:
        """SGC's lambda now; 0 without the path."""
        return max((projection.sgc_lambda for projection in self.projections().values()), default=0.0)

    def set_sgc_lambda(self, lam: float) -> None:
        """Set SGC's lambda of every projection; 0 switches the path off."""
        for projection in self.projections().values():
            projection.sgc_lambda = lam

    @classmethod
    def from_dense(
        cls,
        dense: "SpikingMambaForCausalLM | Mamba2ForCausalLM | str",
        neuron: dict | MemoryModule | None = None,
        sgc: dict | None = None,
        membrane: str = "token",
        threshold: Any = 1.0,
        learn_threshold: bool = False,
    ) -> "SpikingMambaForCausalLM":
        """A student with the weights of a dense Mamba2 and neurons in front of its projections.

        Args:
            dense: a model of this class or transformers' ``Mamba2ForCausalLM``, or the folder or hub name
                of a checkpoint of transformers or of state-spaces.
            neuron: a spec or a node as an example; ``None`` gives a dense copy.
            sgc, membrane, threshold, learn_threshold: see :class:`SpikingMambaConfig`.

        Returns:
            A new model in training mode, on the device and in the dtype of ``dense``.
        """
        if isinstance(neuron, nn.Module):
            neuron = neurons.spec_of(neuron)
        if not isinstance(dense, nn.Module):
            dense = load_dense(dense)
        fields = {k: v for k, v in dense.config.to_dict().items() if k not in ("model_type", "architectures")}
        config = SpikingMambaConfig.from_dict(
            fields
            | {
                "neuron": neuron,
                "sgc": sgc,
                "membrane": membrane,
                "threshold": threshold,
                "learn_threshold": learn_threshold,
            }
        )
        model = cls(config).to(dense.device)
        for parameter_name, parameter in model.named_parameters():
            if not parameter_name.endswith("log_threshold"):
                parameter.data = parameter.data.to(dense.dtype)
        incompatible = model.load_state_dict(dense.state_dict(), strict=False)
        own = (".log_threshold", ".neuron.")  # what a student has and a dense model has not
        missing = [key for key in incompatible.missing_keys if not any(part in key for part in own)]
        if missing or incompatible.unexpected_keys:
            raise ValueError(
                f"Weights do not fit: missing {missing}, unexpected {incompatible.unexpected_keys}."
            )
        model.generation_config = copy.deepcopy(dense.generation_config)
        return model.train()


def spike_driven(model: SpikingMambaForCausalLM) -> SpikingMambaForCausalLM:
    """A copy of ``model`` whose projections are fed by ternary micro-steps and sum them.

    Every projection sees, for the same input, exactly the integers of ``model``; its weight only ever
    meets -1, 0 and 1.

    Raises:
        ValueError: the neuron has no signed integer spikes.
    """
    config = copy.deepcopy(model.config)
    config.spike_driven = True
    config.__post_init__()
    driven = copy.deepcopy(model)
    driven.config = driven.backbone.config = config
    for projection in driven.projections().values():
        projection.spike_driven = True
    return driven
