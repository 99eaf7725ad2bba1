"""The backbone: embeddings, blocks and the last norm."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from spikingjelly.activation_based.base import MemoryModule
from torch import nn

from spiking_mamba.model import cache as caches
from spiking_mamba.model.block import SpikingMambaBlock
from spiking_mamba.model.cache import Cache, SpikingMambaOutput, takes_any_cache_name
from spiking_mamba.model.configuration import PROJECTIONS, SpikingMambaConfig
from spiking_mamba.model.norms import RMSNorm
from spiking_mamba.model.packing import Packing, moved, packing_of, reject_unknown_arguments
from spiking_mamba.model.pretrained import SpikingMambaPreTrainedModel
from spiking_mamba.model.projection import SpikeEncoder

__all__ = ["SpikingMambaModel", "Stream"]


class Stream(MemoryModule):
    """The state of a sequence fed token by token in step mode 's'.

    The model's cache as a memory, which ``functional.reset_net`` forgets.
    """

    def __init__(self) -> None:
        super().__init__()
        self.step_mode = "m"
        self.register_memory("cache", None)

    def detach(self) -> None:
        """Cut the cached states, in place, from the graph of the tokens before."""
        for states, key in () if self.cache is None else caches.tensors(self.cache):
            states[key].detach_()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> "Stream":
        self.reset()  # a sequence does not survive a move to another device or dtype
        return super()._apply(fn)


class _Run(NamedTuple):
    """What a pass through all blocks leaves.

    Attributes:
        hidden_states: ``[B, L, hidden_size]``, behind the last norm.
        residuals: the residual stream behind every block, where asked for.
        costs: accumulations and fetched weights of each token, float32 ``[B, L, 2]``; None: not asked for; of
            a dense model ``[2]``, zeros.
    """

    hidden_states: torch.Tensor
    residuals: list[torch.Tensor]
    costs: torch.Tensor | None

    def moved(self, order: torch.Tensor) -> "_Run":
        """The same with tokens in another order, see :func:`~spiking_mamba.model.packing.moved`."""
        hidden_states, *residuals = (moved(each, order) for each in (self.hidden_states, *self.residuals))
        costs = self.costs
        return _Run(
            hidden_states, residuals, costs if costs is None or costs.ndim == 1 else moved(costs, order)
        )

    def returned(
        self, cache: Cache | None, with_residuals: bool, as_output: bool
    ) -> tuple | SpikingMambaOutput:
        """What the model returns of it, without what was not asked for."""
        states = (*self.residuals, self.hidden_states) if with_residuals else None
        accumulations, fetches = (None, None) if self.costs is None else self.costs.unbind(-1)
        if not as_output:
            values = (self.hidden_states, cache, states, accumulations)
            return tuple(value for value in values if value is not None)
        named: dict[str, Any] = {caches.OUTPUT_NAME: cache}
        return SpikingMambaOutput(
            last_hidden_state=self.hidden_states,
            hidden_states=states,
            accumulations=accumulations,
            fetches=fetches,
            **named,
        )


class SpikingMambaModel(SpikingMambaPreTrainedModel):
    """The backbone: embeddings, blocks and the last norm.

    In step mode 's' a call continues the sequence of the calls before it, unless the model trains, a cache is
    passed, or ``use_cache=False`` asks for no state. Streams are for inference, under ``torch.no_grad()``:
    their states move on in place.
    """

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012  # AutoModel wants the backbone alone

    def __init__(self, config: SpikingMambaConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(SpikingMambaBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self._states = config.states_per_neuron  # of a neuron; the configuration builds one to say so
        self.stream = Stream()
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def _has_potentials(self) -> bool:
        """Whether neurons carry states from token to token, swapped ones too."""
        return any(encoder.number_of_states for encoder in self._encoders())

    def _encoders(self) -> Iterator[SpikeEncoder]:
        for block in self.blocks:
            for name in block.mixer.encoders.values():
                yield getattr(block.mixer, name)

    @property
    def blocks(self) -> Sequence[SpikingMambaBlock]:
        """The layers by their type, of which an ``nn.ModuleList`` says nothing."""
        return cast("Sequence[SpikingMambaBlock]", self.layers)

    def get_input_embeddings(self) -> nn.Embedding:
        """The layer that makes vectors of token ids, ``[vocab_size, hidden_size]``."""
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another layer in its place, or what an adapter has wrapped around it."""
        self.embeddings = cast(nn.Embedding, value)

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
        output_accumulations: bool = False,
        seq_idx: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple | SpikingMambaOutput:
        """A batch of sequences, or their next tokens behind those that a cache, or the stream, has seen.

        Args:
            input_ids: ``[B, L]`` token ids. inputs_embeds: ``[B, L, hidden_size]`` instead of them.
            cache: states of the tokens before these; they move on. Has all of :data:`~.cache.CACHE_NAMES`.
            use_cache: return a cache, a new one where none is passed; by default as the configuration says,
                and not in training.
            output_hidden_states: return the residual stream behind every block.
            output_accumulations: return what the spikes cost, see :class:`SpikingMambaOutput`.
            return_dict: false for a tuple.
            attention_mask: ``[B, L]``, or longer by what the cache has seen; 1 for tokens, 0 for padding, on
                any side or inside: no state moves there, and what comes out at it means nothing.
            seq_idx, position_ids, cu_seq_lens_q: any of them says where documents begin that are packed in
                one row, see :func:`~spiking_mamba.model.packing.documents_of`; each starts afresh.

        Raises:
            TypeError: an argument that is none of these, nor one of :data:`~.packing.IGNORED`.
            ValueError: arguments that do not go together, see :meth:`_embed` and :meth:`_begin`.
        """
        reject_unknown_arguments(kwargs)
        hidden_states = self._embed(input_ids, inputs_embeds)
        batch, length, _ = hidden_states.shape
        streaming = self.streams(cache, use_cache)
        cache, use_cache = self._begin(cache, use_cache, batch, length)
        packed = (attention_mask, seq_idx, position_ids, cu_seq_lens_q, cache is not None)
        order, packing = packing_of((batch, length), *packed, self._has_potentials)
        config, moves = self.config, moved(hidden_states, order)
        keeps = bool(config.output_hidden_states if output_hidden_states is None else output_hidden_states)
        output = self._run_blocks(moves, cache, packing, keeps, output_accumulations)
        if order is not None:
            output = output.moved(torch.argsort(order, dim=1))
        if streaming:
            self.stream.cache = cache
        as_output = bool(config.return_dict if return_dict is None else return_dict)
        return output.returned(cache if use_cache else None, keeps, as_output)

    def _embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """``[B, L, hidden_size]``, what the first block gets.

        Raises:
            ValueError: neither ids nor embeddings are given, or both; they are not of these shapes, or hold
                no token; a token id lies outside the vocabulary (checked on the CPU).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either input_ids or inputs_embeds.")
        if inputs_embeds is not None:
            size = self.config.hidden_size
            if inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != size or 0 in inputs_embeds.shape:
                raise ValueError(
                    f"inputs_embeds must be [batch, length, {size}] of at least one token, got "
                    f"{list(inputs_embeds.shape)}."
                )
            return inputs_embeds
        assert input_ids is not None
        if input_ids.dim() != 2 or 0 in input_ids.shape:
            raise ValueError(
                f"input_ids must be [batch, length] of at least one token, got {list(input_ids.shape)}."
            )
        self._check_ids(input_ids)
        return self.embeddings(input_ids)

    def _begin(
        self, cache: Cache | None, use_cache: bool | None, batch: int, length: int
    ) -> tuple[Cache | None, bool]:
        """The cache that ``batch`` rows of ``length`` tokens go on from, and whether to return it.

        Raises:
            ValueError: the batch size has changed in the midst of a stream; a single token is streamed in
                training; a cache is passed in training with gradient checkpointing, which would run every
                block twice on it; a cache is another model's, or of another batch size.
        """
        if self._asks_to_stream(cache, use_cache) and self.training and length == 1:
            raise ValueError(
                "Step mode 's' streams in inference alone, and this model is in training: call eval(), or "
                "pass a cache, whose states carry gradients."
            )
        streaming = self.streams(cache, use_cache)
        if streaming:
            cache = self._stream_cache(batch)
        if use_cache is None:
            use_cache = streaming or (self.config.use_cache and not self.training)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if cache is not None:
                raise ValueError("Gradient checkpointing would move a cache on twice: pass none in training.")
            use_cache = False
        if use_cache and cache is None:
            cache = caches.new_cache(self.config)
        if cache is not None:
            self._check_cache(cache, batch)
        return cache, use_cache

    def _check_cache(self, cache: Cache, batch: int) -> None:
        """Refuse a cache that these rows cannot go on from."""
        if any(encoder.number_of_states != self._states for encoder in self._encoders()):
            raise ValueError(
                f"The configuration's neurons carry {self._states} states from token to token, and those in "
                "their place another number, for which a cache has no room: save_pretrained() and load the "
                "model, or pass use_cache=False."
            )
        wanted = [1 + len(PROJECTIONS) * self._states] * len(self.blocks)
        if (found := caches.sizes(cache)) != wanted:
            raise ValueError(f"The cache is another model's: states a layer {found}, wanted {wanted}.")
        if (held := caches.batch_size(cache)) not in (None, batch):
            raise ValueError(f"The cache holds {held} sequences, this call has {batch}.")

    def _run_blocks(
        self,
        hidden_states: torch.Tensor,
        cache: Cache | None,
        packing: Packing | None,
        keeps_residuals: bool,
        output_accumulations: bool,
    ) -> "_Run":
        residuals: list[torch.Tensor] = []
        costs: torch.Tensor | None = None
        for block in self.blocks:
            hidden_states = block(
                hidden_states, cache=cache, packing=packing, output_accumulations=output_accumulations
            )
            if output_accumulations:
                hidden_states, cost = hidden_states
                costs = cost if costs is None else costs + cost
            if keeps_residuals:
                residuals.append(hidden_states)
        return _Run(self.norm_f(hidden_states), residuals, costs)

    def _check_ids(self, input_ids: torch.Tensor | None) -> None:
        if input_ids is None or input_ids.device.type != "cpu" or torch.compiler.is_compiling():
            return
        # what wraps embeddings may not say how many they are
        vocabulary = getattr(self.embeddings, "num_embeddings", self.config.vocab_size)
        if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < vocabulary:
            raise ValueError(
                f"input_ids reach from {int(input_ids.min())} to {int(input_ids.max())}, "
                f"outside the vocabulary of {vocabulary}."
            )

    def streams(self, cache: Cache | None, use_cache: bool | None) -> bool:
        """Whether a call with these arguments continues the sequence of the calls before it."""
        return self._asks_to_stream(cache, use_cache) and not self.training

    def _asks_to_stream(self, cache: Cache | None, use_cache: bool | None) -> bool:
        return self.stream.step_mode == "s" and cache is None and use_cache is not False

    def one_token(self, input_ids: torch.Tensor, cache: Cache) -> torch.Tensor:
        """``[B, 1] -> [B, 1, hidden_size]`` with a cache that has states; they move on in place."""
        hidden_states = self.embeddings(input_ids)
        for block in self.blocks:
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
