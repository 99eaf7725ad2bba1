"""A report written once: what it is made of, and how it reads in Markdown (:mod:`.page`: as a page).

Texts are plain: whatever stands in them (a model's name, a path) is shown as it is and never interpreted.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spiking_mamba.reports.figures import Panel, plain, write_png

__all__ = [
    "Block",
    "Code",
    "Glance",
    "Heading",
    "Paragraph",
    "Picture",
    "Quote",
    "Table",
    "drawn",
    "markdown_table",
    "to_markdown",
]


@dataclass(frozen=True)
class Heading:
    """A section's title; the first block of a document is its only heading of level 1."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Text, in Markdown's inline marks."""

    text: str


@dataclass(frozen=True)
class Quote:
    """What somebody, or a model, has said."""

    text: str


@dataclass(frozen=True)
class Code:
    """Text to be shown line by line."""

    text: str


@dataclass(frozen=True)
class Table:
    """Cells are text; the first column holds the rows' names."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG in the document's own folder, and what it shows for those who cannot see it.

    A page shows its panels instead, where it has them.
    """

    path: Path
    text: str
    panels: Sequence[Panel] = ()


@dataclass(frozen=True)
class Glance:
    """The answer, for who reads no further: a few sentences, by what each is about, beside a picture."""

    sentences: Mapping[str, str]
    picture: Picture | None


Block = Heading | Paragraph | Quote | Code | Table | Picture | Glance


def drawn(path: Path, panels: Sequence[Panel]) -> Picture:
    """Panels, drawn to a PNG."""
    write_png(path, panels)
    return Picture(path, " ".join(panel.text for panel in panels), panels)


def _escape_markdown(text: object) -> str:
    # an underscore within a word is no markup, and arc\_easy would read badly in a terminal
    return re.sub(r"[\\`*\[\]<>|~&$#!]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", plain(text))


def to_markdown(blocks: Sequence[Block]) -> str:
    """The document in GitHub's Markdown; its pictures are linked, each where it first comes."""
    parts: list[str] = []
    linked: set[Path] = set()

    def link(picture: Picture | None) -> None:
        if picture is not None and picture.path not in linked:
            linked.add(picture.path)
            parts.append(f"![{_escape_markdown(picture.text)}]({picture.path.name})")

    for block in blocks:
        match block:
            case Heading(text, level):
                parts.append("#" * level + " " + _escape_markdown(text))
            case Paragraph(text):
                parts.append(_escape_markdown(text))
            case Quote(text):
                parts.append(f"> {_escape_markdown(text)}")
            case Code(text):
                fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
                parts.append(f"{fence}text\n{text}\n{fence}")
            case Table(header, rows):
                cells = [[_escape_markdown(cell) for cell in row] for row in (header, *rows)]
                parts.append(markdown_table(cells[0], cells[1:]))
            case Picture():
                link(block)
            case Glance(sentences, image):
                parts += [f"{name}: {_escape_markdown(said)}" for name, said in sentences.items()]
                link(image)
    return "\n\n".join(parts) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, padded so that it reads well in a terminal too.

    All but the first column are aligned to the right.
    """
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(2, *map(len, column)) for column in zip(*cells, strict=True)]  # "-:" takes two

    def line(row: Sequence[str]) -> str:
        first, *rest = row
        padded = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])
