"""Rows of token ids, as a training step takes them."""

from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from transformers import TrainingArguments

from spiking_mamba.common.errors import RunError

__all__ = ["check_rows", "collate"]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of equal length to ``input_ids`` and ``labels`` of shape ``[B, L]``."""
    ids = np.array([row["input_ids"] for row in rows], dtype=np.int64)  # faster than torch, from lists too
    input_ids = torch.from_numpy(ids)
    return {"input_ids": input_ids, "labels": input_ids.clone()}


def check_rows(rows: datasets.Dataset, arguments: TrainingArguments, vocab_size: int) -> None:
    """Raise a RunError when the data do not fill one batch, or hold a token that the model does not know."""
    batch = arguments.per_device_train_batch_size
    if len(rows) < batch:
        raise RunError(
            f"The data make {len(rows)} rows, fewer than one batch of {batch}: give more text, "
            "or a smaller training.per_device_train_batch_size."
        )
    largest = pc.max(pc.list_flatten(rows.data.column("input_ids"))).as_py()
    if largest >= vocab_size:
        raise RunError(
            f"The data hold the token id {largest}, outside the vocabulary of {vocab_size}: "
            "the tokenizer does not belong to the model."
        )
