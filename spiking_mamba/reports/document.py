"""A report written once and rendered twice: as Markdown, and as one HTML file that needs nothing else.

Texts are plain: whatever stands in them (a model's name, a path) is shown as it is and never interpreted.
"""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spiking_mamba.common.files import write_whole

__all__ = [
    "Block",
    "Code",
    "Heading",
    "Paragraph",
    "Picture",
    "Quote",
    "Table",
    "markdown_table",
    "to_html",
    "to_markdown",
    "write_document",
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
    """A PNG in the document's own folder, and what it shows for those who cannot see it."""

    path: Path
    text: str


Block = Heading | Paragraph | Quote | Code | Table | Picture


def _plain(text: object) -> str:
    """One line of valid Unicode, for control characters and halves of surrogate pairs may come in names."""
    line = "".join(c if c.isprintable() else " " for c in str(text))
    return " ".join(line.split())


def _escape_markdown(text: object) -> str:
    # an underscore within a word is no markup, and arc\_easy would read badly in a terminal
    return re.sub(r"[\\`*\[\]<>|~&$#!]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", _plain(text))


def to_markdown(blocks: Sequence[Block]) -> str:
    """The document in GitHub's Markdown; its pictures are linked."""
    parts = []
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
            case Picture(path, text):
                parts.append(f"![{_escape_markdown(text)}]({path.name})")
    return "\n\n".join(parts) + "\n"


_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1f24; --line: #d0d7de; --band: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171a; --text: #e3e7eb; --line: #3a424b; --band: #1e2328; }
}
body { max-width: 64rem; margin: 0 auto; padding: 1rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line);
  text-align: right; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: break-word;
  min-width: min(15rem, 30vw); max-width: min(24rem, 45vw);
  position: sticky; left: 0; background: var(--page); }
tbody tr:hover td { background: var(--band); }
img { display: block; max-width: 100%; min-width: 36rem; height: auto; margin: 1rem 0;
  background: #fff; border-radius: 4px; }
blockquote { margin-left: 0; padding-left: 1rem; border-left: 3px solid var(--line); }
pre { overflow-x: auto; padding: 0.75rem; background: var(--band); font-size: 0.8125rem; }
"""
# nothing but what is in the file itself may be shown, and nothing at all may run
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(_plain(c))}</{tag}>" for c in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return (
        '<div class="wide" tabindex="0"><table>\n'
        f"<thead>{line(header, 'th')}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def to_html(blocks: Sequence[Block]) -> str:
    """The document as one HTML page, its pictures within; the first block is its title."""
    parts = []
    for block in blocks:
        match block:
            case Heading(text, level):
                parts.append(f"<h{level}>{html.escape(_plain(text))}</h{level}>")
            case Paragraph(text):
                parts.append(f"<p>{html.escape(_plain(text))}</p>")
            case Quote(text):
                parts.append(f"<blockquote>{html.escape(_plain(text))}</blockquote>")
            case Code(text):
                parts.append(f'<pre tabindex="0">{html.escape(text)}</pre>')
            case Table(header, rows):
                parts.append(_html_table(header, rows))
            case Picture(path, text):
                data = base64.b64encode(path.read_bytes()).decode()
                image = f'<img src="data:image/png;base64,{data}" alt="{html.escape(_plain(text))}">'
                parts.append(f'<div class="wide" tabindex="0">{image}</div>')
    assert isinstance(blocks[0], Heading)
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{html.escape(_plain(blocks[0].text))}</title>\n<style>{_STYLE}</style>"
    )
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def write_document(folder: Path, blocks: Sequence[Block]) -> None:
    """Write ``report.md`` and ``report.html`` to ``folder``, where the document's pictures are."""
    write_whole(folder / "report.md", to_markdown(blocks))
    write_whole(folder / "report.html", to_html(blocks))


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
