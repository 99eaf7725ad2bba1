"""Text to train on, and rows of its token ids as a training step takes them."""

from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from transformers import TrainingArguments

from spiking_mamba.common.errors import DataError, RunError
from spiking_mamba.data.contamination import evaluated_words, without_evaluated
from spiking_mamba.data.text import load_text

__all__ = ["check_rows", "collate", "training_text"]


def training_text(source: Any, split: str | None, decontaminate: bool) -> datasets.Dataset:
    """Documents to train on, see ``load_text``.

    Args:
        source, split: as in ``load_text``.
        decontaminate: leave out those that overlap what is evaluated; the first process prints how many.

    Raises:
        DataError: see ``load_text``; nothing is left; or what is evaluated cannot be had.
    """
    text = load_text(source, split=split)
    if not decontaminate:
        return text
    try:
        words = evaluated_words()
    except DataError as error:
        raise DataError(
            f"{error} It is needed to leave out what is evaluated; decontaminate=false trains without a look."
        ) from error
    kept, overlap = without_evaluated(text, words)
    if PartialState().is_main_process:
        print(f"Text to train on: {overlap}.", flush=True)
    return kept


def collate(rows: list[dict[str, Any]], end_of_text: int | None = None) -> dict[str, torch.Tensor]:
    """Rows of equal length to what a training step takes.

    Args:
        rows: each with ``input_ids``, documents packed as ``spiking_mamba.data.tokenize`` packs them.
        end_of_text: the token that stands between documents; None: a row counts as one document.

    Returns:
        ``input_ids`` and ``labels``, int64 ``[B, L]``; with ``end_of_text`` also ``seq_idx``, int32
        ``[B, L]``, the number of each token's document in its row. An end-of-text token belongs to the
        document that it stands before, whose first token it predicts.
    """
    ids = np.array([row["input_ids"] for row in rows], dtype=np.int64)  # faster than torch, from lists too
    input_ids = torch.from_numpy(ids)
    batch = {"input_ids": input_ids, "labels": input_ids.clone()}
    if end_of_text is not None:
        batch["seq_idx"] = (input_ids == end_of_text).cumsum(1, dtype=torch.int32)
    return batch


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
