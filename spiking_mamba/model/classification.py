"""A spiking Mamba2 that classifies sequences: what their last token knows, scored by a linear layer."""

from typing import Any, cast

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from spiking_mamba.model import cache as caches
from spiking_mamba.model.backbone import SpikingMambaModel
from spiking_mamba.model.cache import Cache, takes_any_cache_name
from spiking_mamba.model.configuration import SpikingMambaConfig
from spiking_mamba.model.packing import documents_of, real_tokens
from spiking_mamba.model.pretrained import SpikingMambaPreTrainedModel

__all__ = ["SpikingMambaForSequenceClassification"]


def _last_tokens(real: torch.Tensor, document: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and place, int64 ``[documents]`` each, of the last token of every document.

    Without documents, of every row, where one of padding alone counts as tokens.
    """
    if document is None:
        real = real | ~real.any(1, keepdim=True)
        document = torch.zeros_like(real, dtype=torch.int32)
    row, place = real.nonzero(as_tuple=True)
    belongs = torch.stack([row, document[row, place].long()])
    last = torch.ones_like(row, dtype=torch.bool)
    last[:-1] = (belongs[:, 1:] != belongs[:, :-1]).any(0)
    return row[last], place[last]


class SpikingMambaForSequenceClassification(SpikingMambaPreTrainedModel):
    """The backbone and a linear layer that scores ``config.num_labels`` labels.

    ``from_pretrained`` takes the folder of a language model, too: its head is left, the scores are new.
    """

    _new_in_checkpoints_of_others = frozenset({"score.weight"})
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012 (as transformers declares it)
    accepts_loss_kwargs = False  # the loss is a mean over sequences: a trainer averages its batches itself

    def __init__(self, config: SpikingMambaConfig) -> None:
        super().__init__(config)
        self.num_labels = cast(int, config.num_labels)
        self.backbone = SpikingMambaModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embeddings."""
        return self.backbone.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put others in their place."""
        self.backbone.embeddings = cast(nn.Embedding, value)

    @takes_any_cache_name
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: Cache | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple | SequenceClassifierOutputWithPast:
        """The scores of every sequence, and their loss where labels are given.

        Args:
            labels: of every sequence: int64 ``[sequences]`` for one label of several, float
                ``[sequences, num_labels]`` for several labels at once or for numbers; ``config.problem_type``
                says which, or the first labels do, as in transformers.
            attention_mask: ``[B, L]``, 0 for padding, on any side. Without one, the score is taken at the
                last token that is not ``config.pad_token_id``, whose padding should then be on the right.
            seq_idx, position_ids, cu_seq_lens_q: any of them makes each document of a row a sequence.
            input_ids, inputs_embeds, cache, output_hidden_states, return_dict, use_cache: see
                :meth:`SpikingMambaModel.forward`.

        Returns:
            Logits ``[B, num_labels]`` in float32; ``[documents, num_labels]`` of packed rows, in the order of
            rows and of documents within them.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        output = self.backbone(
            input_ids,
            inputs_embeds=inputs_embeds,
            cache=cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            attention_mask=attention_mask,
            seq_idx=seq_idx,
            position_ids=position_ids,
            cu_seq_lens_q=cu_seq_lens_q,
            **kwargs,
        )
        hidden = output.last_hidden_state
        packing = attention_mask, seq_idx, position_ids, cu_seq_lens_q
        row, place = self._last_tokens(input_ids, hidden, *packing)
        logits = self.score(hidden[row, place].to(self.score.weight.dtype)).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        if not return_dict:
            return tuple(v for v in (loss, logits, output.cache, output.hidden_states) if v is not None)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            **{caches.OUTPUT_NAME: output.cache},
        )

    def _last_tokens(
        self,
        input_ids: torch.Tensor | None,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None,
        seq_idx: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cu_seq_lens_q: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and place, int64 ``[sequences]`` each, of every sequence's last real token."""
        shape = (hidden.shape[0], hidden.shape[1])
        real = real_tokens(attention_mask, shape)
        document = documents_of(shape, seq_idx, position_ids, cu_seq_lens_q, real)
        padding = self.config.pad_token_id
        if attention_mask is None and document is None and input_ids is not None and padding is not None:
            real = input_ids != padding
        if real is None:
            real = torch.ones(shape, dtype=torch.bool, device=hidden.device)
        return _last_tokens(real, document)
