"""A Mamba2 language model whose two projections per block are fed by spikes.

One explicit-state core with two skins. transformers': ``generate()`` and ``cache``. spikingjelly's:
``functional.set_step_mode(model, "s")``, one token a call, ``functional.reset_net(model)`` between
sequences. A dense Mamba2 is the same model with ``config.neuron = None``.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from spikingjelly.activation_based.base import MemoryModule
from torch import nn
from transformers import GenerationMixin, Mamba2ForCausalLM

import neurons
from spiking_mamba.model import cache as caches
from spiking_mamba.model.backbone import SpikingMambaModel
from spiking_mamba.model.cache import (
    Cache,
    SpikingMambaCausalLMOutput,
    SpikingMambaOutput,
    takes_any_cache_name,
)
from spiking_mamba.model.configuration import SpikingMambaConfig
from spiking_mamba.model.decoding import DecodingGraphs
from spiking_mamba.model.dense import read_dense, student_of
from spiking_mamba.model.graph_generation import cannot_loop, decode
from spiking_mamba.model.pretrained import SpikingMambaPreTrainedModel
from spiking_mamba.model.projection import SpikingProjection, spike_fed

__all__ = ["SpikingMambaForCausalLM"]


def _positions_to_keep(hidden_states: torch.Tensor, which: int | torch.Tensor) -> torch.Tensor:
    """``[B, L, C]`` at the last ``which`` positions (0: all), or at those that a tensor of indices names.

    One list for all rows ``[n]``, or one for each ``[B, n]``.
    """
    if isinstance(which, int):
        return hidden_states[:, -which:] if which else hidden_states
    if which.ndim == 2:
        return torch.take_along_dim(hidden_states, which[..., None], dim=1)
    return hidden_states[:, which]


def _returned(
    loss: torch.Tensor | None, logits: torch.Tensor, backbone: SpikingMambaOutput, return_dict: bool
) -> tuple | SpikingMambaCausalLMOutput:
    cache = getattr(backbone, caches.OUTPUT_NAME)
    if not return_dict:
        values = (loss, logits, cache, backbone.hidden_states, backbone.accumulations)
        return tuple(value for value in values if value is not None)
    named: dict[str, Any] = {caches.OUTPUT_NAME: cache}
    return SpikingMambaCausalLMOutput(
        loss=loss,
        logits=logits,
        hidden_states=backbone.hidden_states,
        accumulations=backbone.accumulations,
        fetches=backbone.fetches,
        **named,
    )


def _padding_first(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of ``generate()``, where padding behind a prompt, by ``attention_mask``, is before it."""
    mask = kwargs.get("attention_mask")
    given = {name: kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")}
    if args:
        given["inputs"] = args[0]
    prompts = {name: value for name, value in given.items() if value is not None}
    if mask is None or mask.ndim != 2 or not prompts or bool(mask[:, -1].all()):
        return args, kwargs
    length = next(iter(prompts.values())).shape[1]
    before, own = mask[:, :-length], mask[:, -length:]
    trailing = own.ne(0).flip(1).int().argmax(1, keepdim=True)  # 0 of a row of padding alone
    places = (torch.arange(length, device=mask.device) - trailing) % length
    moved = {
        name: value.gather(1, places[(...,) + (None,) * (value.ndim - 2)].expand_as(value).to(value.device))
        for name, value in prompts.items()
    }
    kwargs = kwargs | {"attention_mask": torch.cat([before, own.gather(1, places)], 1)}
    if args:
        return (moved.pop("inputs"), *args[1:]), kwargs | moved
    return args, kwargs | moved


class SpikingMambaForCausalLM(SpikingMambaPreTrainedModel, GenerationMixin):
    """The language model; ``config.neuron = None`` makes it a dense Mamba2."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: SpikingMambaConfig) -> None:
        super().__init__(config)
        self.backbone = SpikingMambaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.graphs: DecodingGraphs | None = None
        self.post_init()

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> "SpikingMambaForCausalLM":
        if self.graphs is not None:  # they read the tensors that are about to move
            self.capture_decoding()
        return super()._apply(fn, recurse)

    def get_input_embeddings(self) -> nn.Embedding:
        """The backbone's."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another layer in its place."""
        self.backbone.set_input_embeddings(value)

    @takes_any_cache_name
    def generate(self, *args: Any, cache: Cache | None = None, **kwargs: Any) -> Any:
        """As in transformers; ``cache`` holds the tokens before ``input_ids``, under any of its names.

        Padding behind a prompt comes to stand before it, in what is returned, too: a text goes on behind its
        own last token.
        """
        named = {} if cache is None else {caches.GENERATION_NAME: cache}
        args, kwargs = _padding_first(args, kwargs)
        if self._loops(args, kwargs):
            lasts = cache is not None or self.backbone.streams(None, True)
            # transformers does not hand the streamer on to a loop that is passed
            kwargs["custom_generate"] = functools.partial(
                decode, ahead=not lasts, streamer=kwargs.get("streamer")
            )
        return super().generate(*args, **named, **kwargs)

    def _loops(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether a call of ``generate()`` goes through the loop that keeps the device busy."""
        if self.graphs is None or kwargs.get("custom_generate") is not None or kwargs.get("synced_gpus"):
            return False
        return cannot_loop(self, args, kwargs) is None

    @takes_any_cache_name
    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        *args: Any,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Arguments of the next forward pass of ``generate()``."""
        # it would make masks for attention from a cache
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if cache is not None and not is_first_iteration and inputs.get("attention_mask") is not None:
            ids = inputs.get("input_ids")
            if ids is not None and ids.shape[1] == 1:  # a token that was just drawn is no padding
                inputs["attention_mask"] = None
        # documents are not packed here; a tokenizer is for what looks for strings
        for name in ("position_ids", "tokenizer"):
            inputs.pop(name, None)
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
        output_accumulations: bool = False,
        seq_idx: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple | SpikingMambaCausalLMOutput:
        """Next-token logits, and their loss where labels are given.

        Args:
            labels: ``[B, L]``, the tokens themselves, shifted in here; -100 is ignored.
            logits_to_keep: positions whose logits are wanted: the last so many, 0 for all, or a tensor of
                indices ``[n]`` or ``[B, n]``.
            input_ids, inputs_embeds, cache, output_hidden_states, return_dict, use_cache, attention_mask,
                output_accumulations, seq_idx, position_ids, cu_seq_lens_q: see
                :meth:`SpikingMambaModel.forward`.
            num_items_in_batch: by what the loss's sum is divided, instead of by its number of tokens.

        Returns:
            Logits ``[B, L, vocab_size]`` in float32, and the mean cross-entropy.
        """
        return_dict = bool(self.config.return_dict if return_dict is None else return_dict)
        others = (labels, attention_mask, seq_idx, position_ids, cu_seq_lens_q)
        plain = all(value is None for value in others) and not (output_hidden_states or output_accumulations)
        if plain and return_dict and (output := self._captured(input_ids, cache, use_cache)) is not None:
            return output
        output = self.backbone(
            input_ids,
            inputs_embeds=inputs_embeds,
            cache=cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            attention_mask=attention_mask,
            output_accumulations=output_accumulations,
            seq_idx=seq_idx,
            position_ids=position_ids,
            cu_seq_lens_q=cu_seq_lens_q,
            **kwargs,
        )
        logits = self._head(_positions_to_keep(output.last_hidden_state, logits_to_keep))
        loss = None if labels is None else self._loss(logits, labels, num_items_in_batch)
        return _returned(loss, logits, output, return_dict)

    def _loss(
        self, logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: int | torch.Tensor | None
    ) -> torch.Tensor:
        size = self.config.vocab_size
        return self.loss_function(
            logits=logits, labels=labels, vocab_size=size, num_items_in_batch=num_items_in_batch
        )

    def _head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden_states.to(self.lm_head.weight.dtype)).float()

    def _captured(
        self, input_ids: torch.Tensor | None, cache: Cache | None, use_cache: bool | None
    ) -> SpikingMambaCausalLMOutput | None:
        """One more token's logits by a graph, and the cache.

        None where there are no graphs, where something else is asked for, or somebody watches.
        """
        if self.graphs is None:
            return None
        if self.backbone.streams(cache, use_cache):
            cache = self.backbone.stream.cache
        if cache is None or input_ids is None or input_ids.shape[1] != 1:
            return None
        if self.training or torch.is_grad_enabled() or caches.batch_size(cache) != input_ids.shape[0]:
            return None
        logits = self.graphs(input_ids, cache)
        named: dict[str, Any] = {caches.OUTPUT_NAME: cache}
        return None if logits is None else SpikingMambaCausalLMOutput(logits=logits, **named)

    def _one_token(self, input_ids: torch.Tensor, cache: Cache) -> torch.Tensor:
        return self._head(self.backbone.one_token(input_ids, cache))

    def projections(self) -> dict[str, SpikingProjection]:
        """All projections that neurons feed, by name, ``backbone.layers.0.mixer.in_proj`` and so on."""
        return {name: p for name, p in spike_fed(self) if p.spikes.neuron is not None}

    @property
    def compiles(self) -> bool:
        """Whether the blocks go through ``torch.compile``."""
        return self.backbone.blocks[0].compiles

    def compile_blocks(self, compiles: bool = True) -> None:
        """Run the blocks through ``torch.compile`` wherever no cache is used.

        The first step takes a minute longer, and the first of another length; what is compiled then serves
        all blocks and lengths. Norms, convolution, gates and neurons with ``backend='torch'`` then fuse into
        few kernels; rounding to a 16-bit dtype before a neuron may be left out, so that a spike at a tie
        comes out one quantum apart. Blocks that somebody watches by forward hooks, as ``count_spikes`` does,
        run uncompiled meanwhile.
        """
        for block in self.backbone.blocks:
            block.compiles = compiles

    def capture_decoding(self, captures: bool = True) -> None:
        """Decode by compiled blocks and, on CUDA, as one CUDA graph a batch size.

        For ``generate()`` and for streaming in step mode 's', under ``torch.no_grad()``: whenever one token
        follows others. The first such step compiles and captures for half a minute. What the graphs hold is
        made anew after neurons are swapped or the model moves to another device or dtype. Modules that
        somebody watches by hooks run uncaptured meanwhile.
        """
        self.graphs = DecodingGraphs(self._one_token, self.backbone.layers) if captures else None

    @property
    def sgc_lambda(self) -> float:
        """SGC's lambda now; 0 without the path."""
        return max((p.spikes.sgc_lambda for p in self.projections().values()), default=0.0)

    def set_sgc_lambda(self, lam: float) -> None:
        """Set SGC's lambda of every projection, in [0, 1]; 0 switches the path off.

        Raises:
            ValueError: it lies outside, or the model has no SGC.
        """
        for projection in self.projections().values():
            projection.spikes.sgc_lambda = lam

    def rest_at(self, levels: Mapping[str, torch.Tensor]) -> None:
        """Let inputs of projections rest at these levels, by name; see ``SpikingProjection.rest_at``."""
        projections = self.projections()
        if unknown := sorted(levels.keys() - projections):
            raise ValueError(f"There is no projection {unknown[0]!r}; there are {', '.join(projections)}.")
        for name, level in levels.items():
            projections[name].rest_at(level)

    @classmethod
    def from_dense(
        cls,
        dense: "SpikingMambaForCausalLM | Mamba2ForCausalLM | str",
        neuron: dict | MemoryModule | None = None,
        sgc: dict | None = None,
        membrane: str = "token",
        threshold: Any = 1.0,
        learn_threshold: bool = False,
        shift_inputs: bool = False,
    ) -> "SpikingMambaForCausalLM":
        """A student with the weights of a dense Mamba2 and neurons in front of its projections.

        Args:
            dense: a model of this class or transformers' ``Mamba2ForCausalLM``, or the folder or hub name
                of a checkpoint of transformers or of state-spaces.
            neuron: a spec or a node as an example; ``None`` gives a dense copy.
            sgc, membrane, threshold, learn_threshold, shift_inputs: see :class:`SpikingMambaConfig`; levels
                start at 0, see ``SpikingProjection.rest_at``.

        Returns:
            A new model in training mode, on the device and in the dtype of ``dense``.
        """
        if not isinstance(dense, nn.Module):
            dense = read_dense(dense, cls)
        student = student_of(
            dense,
            cls,
            neuron=neurons.spec_of(neuron) if isinstance(neuron, nn.Module) else neuron,
            sgc=sgc,
            membrane=membrane,
            threshold=threshold,
            learn_threshold=learn_threshold,
            shift_inputs=shift_inputs,
        )
        if isinstance(neuron, nn.Module):  # an example may have learned something
            for projection in student.projections().values():
                assert projection.neuron is not None, "of those that neurons feed"
                projection.neuron.load_state_dict(neuron.state_dict())
        return student
