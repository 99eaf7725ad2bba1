"""A tokenizer made from documents, and rows of token ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import tokenizers
import transformers

from spiking_mamba.common.errors import DataError

__all__ = ["END_OF_TEXT", "count_bytes", "document_stream", "texts_of", "tokenize", "train_tokenizer"]

END_OF_TEXT = "<|endoftext|>"
_BATCH = 1000  # documents at a time


def texts_of(documents: datasets.Dataset) -> Iterator[str | None]:
    """The column `text`, a batch in memory at a time."""
    for batch in documents.iter(_BATCH):
        yield from batch["text"]


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` entries: any text survives encoding and decoding unchanged.

    `<|endoftext|>` has id 0 and is at once end, begin, pad and unknown. The same texts give the same
    tokenizer. Raises DataError for fewer than 257 entries (256 bytes and `<|endoftext|>`).
    """
    if isinstance(texts, str):
        raise TypeError("texts is one string; give a list (or a column) of documents.")
    if vocab_size < 257:
        raise DataError(f"vocab_size is {vocab_size}; 256 bytes and {END_OF_TEXT} need at least 257.")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    special = dict.fromkeys(("eos_token", "bos_token", "pad_token", "unk_token"), END_OF_TEXT)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, clean_up_tokenization_spaces=False, **special
    )


def tokenize(
    dataset: datasets.Dataset,
    tokenizer: transformers.PreTrainedTokenizerBase,
    length: int,
    *,
    drop_last: bool = True,
) -> datasets.Dataset:
    """Packed rows: the documents of column `text`, joined with the end-of-text id, cut every `length` tokens.

    A model carries its state on from one document to the next within a row; only rows start afresh.

    Returns an in-memory dataset with `input_ids`, lists of exactly `length` int32. The incomplete last row
    is dropped, or with `drop_last=False` padded with the end-of-text id; a column `labels` is then -100 at
    the padding and `input_ids` elsewhere. Raises DataError when not one row can be filled (with
    `drop_last=False`: when there is no token).
    """
    if length < 1:
        raise DataError(f"length is {length}; it must be at least 1.")
    ids = document_stream(dataset, tokenizer)[1:]  # end-of-text between documents, not before
    if len(ids) < (length if drop_last else 1):
        raise DataError(
            f"The text has {len(ids)} tokens and a row needs {length}: more text, or shorter rows."
        )
    if drop_last:
        return datasets.Dataset(pa.table({"input_ids": _rows(ids[: len(ids) // length * length], length)}))
    padding = -len(ids) % length
    columns = {
        name: _rows(np.append(ids, np.full(padding, fill, np.int32)), length)
        for name, fill in (("input_ids", tokenizer.eos_token_id), ("labels", -100))
    }
    return datasets.Dataset(pa.table(columns))


def document_stream(dataset: datasets.Dataset, tokenizer: transformers.PreTrainedTokenizerBase) -> np.ndarray:
    """Token ids of the documents of column `text`, end to end, each behind the end-of-text id; int32."""
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("The tokenizer has no end-of-text token (eos_token) to put between documents.")
    pieces: list[np.ndarray] = []
    for batch in dataset.iter(_BATCH):
        texts = batch["text"]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        pieces.extend(np.array([end, *ids], dtype=np.int32) for ids in encoded["input_ids"])
    return np.concatenate(pieces) if pieces else np.empty(0, np.int32)


def _rows(ids: np.ndarray, length: int) -> pa.ChunkedArray:
    """`ids` (int32, a multiple of `length`) as a column of lists, without a copy."""
    step = max(1, 2**30 // length) * length  # offsets within a chunk are 32 bits wide
    chunks = (ids[start : start + step] for start in range(0, len(ids), step))
    return pa.chunked_array(
        [pa.ListArray.from_arrays(np.arange(0, len(c) + 1, length), pa.array(c)) for c in chunks]
    )


def count_bytes(
    dataset: datasets.Dataset, tokenizer: transformers.PreTrainedTokenizerBase | None = None
) -> int:
    """UTF-8 bytes of a dataset's `text`, or, given its byte-level tokenizer, of what its `input_ids` spell.

    End-of-text and other special tokens count as nothing. For bits per byte use the second form: it leaves
    out what `tokenize` dropped.
    """
    if tokenizer is None:
        return sum(len(text.encode()) for text in texts_of(dataset) if text)
    added = tokenizer.get_added_vocab()  # kept as plain text, where the others have one character a byte
    vocabulary = tokenizer.get_vocab()
    size = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, index in vocabulary.items():
        size[index] = len(token.encode()) if token in added else len(token)
    size[tokenizer.all_special_ids] = 0
    return sum(int(size[np.array(batch["input_ids"])].sum()) for batch in dataset.iter(_BATCH))
