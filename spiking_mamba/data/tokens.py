"""A tokenizer made from documents, and rows of token ids."""

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import tokenizers
import transformers

from spiking_mamba.common.claims import claimed
from spiking_mamba.common.errors import DataError
from spiking_mamba.common.files import PART
from spiking_mamba.common.packages import cache_folder
from spiking_mamba.common.progress import watched
from spiking_mamba.data.pieces import pieces

__all__ = [
    "END_OF_TEXT",
    "count_bytes",
    "document_stream",
    "rules_of",
    "texts_of",
    "tokenize",
    "train_tokenizer",
]

END_OF_TEXT = "<|endoftext|>"
MOST_ENTRIES = 2**20  # of a vocabulary; tokenizers takes the memory for all of them first
_BATCH = 100  # documents at a time
IN_MEMORY = 2**28  # characters of text whose tokens are kept in memory
_CHARACTERS, _PIECES = 2**20, 1000  # that are tokenized at a time


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
    if type(vocab_size) is not int or not 257 <= vocab_size <= MOST_ENTRIES:
        raise DataError(
            f"vocab_size is {vocab_size!r}; 256 bytes and {END_OF_TEXT} need at least 257, and there are at "
            f"most {MOST_ENTRIES:,}."
        )
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

    A model carries its state on from one document to the next within a row, unless it is told where they
    begin, as the trainings do (``spiking_mamba.training.rows.collate``).

    Returns a dataset with `input_ids`, lists of exactly `length` int32; in memory or, of much text, mapped
    from a file, see `document_stream`. The incomplete last row is dropped, or with `drop_last=False` padded
    with the end-of-text id; a column `labels` is then -100 at the padding and `input_ids` elsewhere. Raises
    DataError when not one row can be filled (with `drop_last=False`: when there is no token).
    """
    if length < 1:
        raise DataError(f"length is {length}; it must be at least 1.")
    ids = document_stream(dataset, tokenizer)[1:]  # end-of-text between documents, not before
    if len(ids) < (length if drop_last else 1):
        raise DataError(
            f"The text has {len(ids)} tokens and a row needs {length}: more text, or a smaller length."
        )
    if drop_last:
        table = pa.table({"input_ids": _rows(ids[: len(ids) // length * length], length)})
        # without one, datasets would pickle all of the table into memory to make it
        mark = os.urandom(8).hex() if isinstance(ids, np.memmap) else None
        return datasets.Dataset(table, fingerprint=mark)
    padding = -len(ids) % length
    columns = {
        name: _rows(np.append(ids, np.full(padding, fill, np.int32)), length)
        for name, fill in (("input_ids", tokenizer.eos_token_id), ("labels", -100))
    }
    return datasets.Dataset(pa.table(columns))


def document_stream(dataset: datasets.Dataset, tokenizer: transformers.PreTrainedTokenizerBase) -> np.ndarray:
    """Token ids of the documents of column `text`, end to end, each behind the end-of-text id; int32.

    Of much text the ids lie in a file in the cache folder, made once for all processes and runs, and only
    mapped into memory.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("The tokenizer has no end-of-text token (eos_token) to put between documents.")
    if _is_small(dataset):
        return np.concatenate([np.empty(0, np.int32), *_encoded(dataset, tokenizer)])
    return np.memmap(_token_file(dataset, tokenizer), np.int32, "r")


def _is_small(dataset: datasets.Dataset) -> bool:
    characters = 0
    for text in texts_of(dataset):
        characters += len(text or "")
        if characters > IN_MEMORY:
            return False
    return True


def _encoded(
    dataset: datasets.Dataset, tokenizer: transformers.PreTrainedTokenizerBase
) -> Iterator[np.ndarray]:
    """Ids of the documents in order, a limited number of characters at a time, long documents in pieces."""

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        ).input_ids

    def joined(batch: list[tuple[bool, str]]) -> np.ndarray:
        ids = encode([piece for _, piece in batch])
        parts = zip((first for first, _ in batch), ids, strict=True)
        return np.concatenate([np.array([end, *p] if first else p, np.int32) for first, p in parts])

    end = tokenizer.eos_token_id
    batch: list[tuple[bool, str]] = []
    characters = 0
    for text in watched(texts_of(dataset), len(dataset), "tokenizing"):
        for number, piece in enumerate(pieces(text or "", encode)):
            batch.append((number == 0, piece))
            characters += len(piece)
            if characters >= _CHARACTERS or len(batch) >= _PIECES:
                yield joined(batch)
                batch, characters = [], 0
    if batch:
        yield joined(batch)


def _token_file(dataset: datasets.Dataset, tokenizer: transformers.PreTrainedTokenizerBase) -> Path:
    """The file of ids of these documents and this tokenizer, made by whichever process comes first."""
    folder = cache_folder() / "tokens"
    name = _token_key(dataset, tokenizer)
    path = folder / f"{name}.int32"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with claimed(folder / f"{name}.lock", wait=True):
            if not path.is_file():
                _remove_drafts(folder, name)
                draft = path.with_name(path.name + PART)
                with draft.open("wb") as file:
                    for ids in _encoded(dataset, tokenizer):
                        file.write(ids.data)
                    file.flush()
                    os.fsync(file.fileno())
                draft.replace(path)
                size = path.stat().st_size
                print(f"{size // 4:,} tokens are kept in {path}, {size / 1e9:.1f} GB", file=sys.stderr)
    except OSError as error:
        raise DataError(
            f"The tokens cannot be kept in {folder}: {error}. Make room there, or point SPIKING_MAMBA_CACHE "
            "at another folder."
        ) from error
    return path


def _remove_drafts(folder: Path, own: str) -> None:
    """Remove what killed processes have left: a draft without a process that holds its lock, or our own."""
    for draft in folder.glob(f"*{PART}"):
        name = draft.name.partition(".")[0]
        if name == own:
            draft.unlink(missing_ok=True)
            continue
        with claimed(folder / f"{name}.lock") as free:
            if free:
                draft.unlink(missing_ok=True)


def rules_of(tokenizer: transformers.PreTrainedTokenizerBase) -> str | list[tuple[str, int]]:
    """How a tokenizer splits text, as plain data: its rules, or the entries of a slow one, which has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()


def _token_key(dataset: datasets.Dataset, tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    """A hash of all that the ids depend on."""
    rules = rules_of(tokenizer)
    versions = tokenizers.__version__, transformers.__version__
    sha256 = hashlib.sha256(
        repr((1, type(tokenizer).__name__, rules, tokenizer.eos_token_id, versions)).encode()
    )
    for text in texts_of(dataset):
        content = (text or "").encode()
        sha256.update(b"%d:" % len(content))
        sha256.update(content)
    return sha256.hexdigest()[:32]


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
