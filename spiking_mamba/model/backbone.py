"""The backbone: embeddings, blocks and the last norm."""

from typing import Any, ClassVar

import torch
from spikingjelly.activation_based.base import MemoryModule
from torch import nn

from spiking_mamba.model import cache as caches
from spiking_mamba.model.block import SpikingMambaBlock
from spiking_mamba.model.cache import Cache, SpikingMambaOutput, takes_any_cache_name
from spiking_mamba.model.configuration import SpikingMambaConfig
from spiking_mamba.model.norms import RMSNorm
from spiking_mamba.model.packing import documents_of, moved, pack, real_tokens, reject_unknown_arguments
from spiking_mamba.model.pretrained import SpikingMambaPreTrainedModel

__all__ = ["SpikingMambaModel", "Stream"]


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


class SpikingMambaModel(SpikingMambaPreTrainedModel):
    """The backbone: embeddings, blocks and the last norm."""

    _keys_to_ignore_on_load_unexpected: ClassVar = [r"^lm_head\."]  # AutoModel wants the backbone alone

    def __init__(self, config: SpikingMambaConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(SpikingMambaBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self._has_potentials = config.states_per_neuron > 0  # the configuration builds a node to say so
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
        output_accumulations: bool = False,
        seq_idx: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
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
            output_accumulations: return what the spikes cost, see :class:`SpikingMambaOutput`.
            return_dict: false for a tuple.
            attention_mask: ``[B, L]``, or longer by what the cache has seen; 1 for tokens, 0 for padding, on
                any side or inside: no state moves there, and what comes out at it means nothing.
            seq_idx, position_ids, cu_seq_lens_q: any of them says where documents begin that are packed in
                one row, see :func:`~spiking_mamba.model.packing.documents_of`; each starts afresh.

        Raises:
            TypeError: an argument that is none of these, nor one of :data:`~.packing.IGNORED`.
            ValueError: neither ids nor embeddings are given, or both; a token id lies outside the vocabulary
                (checked on the CPU); the batch size has changed in the midst of a stream; a single token is
                streamed in training; a cache is passed in training with gradient checkpointing, which would
                run every block twice on it.
        """
        reject_unknown_arguments(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either input_ids or inputs_embeds.")
        self._check_ids(input_ids)
        length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        if self._asks_to_stream(cache, use_cache) and self.training and length == 1:
            raise ValueError(
                "Step mode 's' streams in inference alone, and this model is in training: call eval(), or "
                "pass a cache, whose states carry gradients."
            )
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
        shape = hidden_states.shape[:2]
        real = real_tokens(attention_mask, shape)
        document = documents_of(shape, seq_idx, position_ids, cu_seq_lens_q, real)
        order, packing = pack(shape, real, document, cache is not None, self._has_potentials)
        hidden_states = moved(hidden_states, order)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        kept: tuple[torch.Tensor, ...] = ()
        costs = None
        for block in self.layers:
            hidden_states = block(
                hidden_states, cache=cache, packing=packing, output_accumulations=output_accumulations
            )
            if output_accumulations:
                hidden_states, cost = hidden_states
                costs = cost if costs is None else costs + cost
            if output_hidden_states:
                kept += (hidden_states,)
        hidden_states = self.norm_f(hidden_states)
        if order is not None:
            back = torch.argsort(order, dim=1)
            hidden_states, *kept = (moved(tensor, back) for tensor in (hidden_states, *kept))
            costs = None if costs is None or costs.ndim == 1 else moved(costs, back)
        if streaming:
            self.stream.cache = cache

        all_states = (*kept, hidden_states) if output_hidden_states else None
        accumulations, fetches = (None, None) if costs is None else costs.unbind(-1)
        cache = cache if use_cache else None
        if not (self.config.return_dict if return_dict is None else return_dict):
            return tuple(
                value for value in (hidden_states, cache, all_states, accumulations) if value is not None
            )
        named = {caches.OUTPUT_NAME: cache}
        return SpikingMambaOutput(
            last_hidden_state=hidden_states,
            hidden_states=all_states,
            accumulations=accumulations,
            fetches=fetches,
            **named,
        )

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
