"""A document as one HTML file that needs nothing else: for telephones, screens by day and night, and paper.

Tables whose cells do not fit beside one another are folded: a row becomes its name and, below it, each value
under its column's. On a screen that is wide enough they are not, and where one is still too wide, it scrolls
and its edge is shaded. Pictures are SVG, a panel each.
"""

import base64
import html
import re
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

from spiking_mamba.common.files import write_whole
from spiking_mamba.reports.document import (
    Block,
    Code,
    Glance,
    Heading,
    Paragraph,
    Picture,
    Quote,
    Table,
    to_markdown,
)
from spiking_mamba.reports.figures import plain, svg

__all__ = ["to_html", "write_document"]

# what a table's cells take beside one another, in characters, on a telephone and on a sheet of paper
_PHONE, _PAPER = 40, 84
_LONG = 24  # characters of a cell that has a line of its own in a folded table
_FOLDED = """
  .{name}.wide { max-width: none; background: none; }
  .{name} table, .{name} tbody { display: block; }
  .{name} thead { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden; }
  .{name} tr { display: grid; align-items: end; gap: 0.25rem 1rem; padding: 0.6rem 0;
    grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--cell)), 1fr));
    border-bottom: 1px solid var(--line); break-inside: avoid; }
  .{name} td { display: block; padding: 0; border: 0; text-align: left; overflow-wrap: anywhere; }
  .{name} td:empty { display: none; }
  .{name} td.long { grid-column: 1 / -1; }
  .{name} td:first-child { position: static; grid-column: 1 / -1; min-width: 0;
    max-width: none; font-weight: 600; }
  .{name} td[data-of]::before { content: attr(data-of); display: block; color: var(--faint);
    font-size: 0.75rem; }
"""
_STYLE = (
    """
:root { color-scheme: light dark; --page: #fff; --text: #1b1f24; --faint: #59636e; --line: #d0d7de;
  --band: #f4f6f8; --shade: rgb(0 0 0 / 35%); }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171a; --text: #e3e7eb; --faint: #9aa4ae; --line: #3a424b; --band: #1e2328;
    --shade: rgb(255 255 255 / 45%); }
}
* { box-sizing: border-box; }
body { max-width: 76rem; margin: 0 auto; padding: 1rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { margin: 0 0 1rem; font-size: 1.75rem; line-height: 1.2; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
p { max-width: 45rem; }
.glance { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr));
  gap: 0.5rem 2rem; }
.glance p { margin: 0 0 0.6rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr));
  gap: 1rem 2rem; margin: 1rem 0; }
svg { display: block; width: 100%; max-width: 32rem; height: auto; fill: currentColor; }
img { display: block; max-width: 100%; height: auto; background: #fff; }
.wide { max-width: max-content; overflow-x: auto; background:
    linear-gradient(to right, var(--page) 40%, transparent) left / 2.5rem 100% no-repeat local,
    linear-gradient(to left, var(--page) 40%, transparent) right / 2.5rem 100% no-repeat local,
    radial-gradient(farthest-side at 0 50%, var(--shade), transparent) left / 0.9rem 100% no-repeat scroll,
    radial-gradient(farthest-side at 100% 50%, var(--shade), transparent) right / 0.9rem 100% no-repeat
    scroll; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line);
  text-align: right; }
th { vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; min-width: min(11rem, 30vw); max-width: 24rem;
  padding-left: 0; position: sticky; left: 0; background: var(--page); }
tbody tr:hover, tbody tr:hover td:first-child { background: var(--band); }
blockquote { margin-left: 0; padding-left: 1rem; border-left: 3px solid var(--line); }
pre { overflow-x: auto; padding: 0.75rem; background: var(--band); font-size: 0.8125rem; }
@media (max-width: 42rem) {"""
    + _FOLDED.replace("{name}", "paper")
    + "}\n@media (max-width: 66rem) {"
    + _FOLDED.replace("{name}", "screen")
    + """}
@media print {
  :root { color-scheme: light; --page: #fff; --text: #000; --faint: #444; --line: #bbb; --band: #fff; }
  @page { margin: 15mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  h1, h2, h3 { break-after: avoid; }
  tr, svg, blockquote { break-inside: avoid; }
  thead { display: table-header-group; }
  .panels, .glance { grid-template-columns: 1fr 1fr; }
  .glance .panels { grid-template-columns: 1fr; margin: 0; }
  .wide { overflow: visible; background: none; }
  th:first-child, td:first-child { position: static; background: none; }
  pre { white-space: pre-wrap; border: 1px solid var(--line); }
  svg, td { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
)
# nothing but what is in the file itself may be shown, and nothing at all may run
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def _escaped(text: object) -> str:
    return html.escape(plain(text))


def _together(cell: str) -> str:
    """A number stays on a line with its unit and its error."""
    return re.sub(r"(?<=\d) (?=\S{1,2}$)| (?=± )|(?<=±) ", "\u00a0", cell)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    heads = [max(map(len, plain(name).split()), default=0) for name in header]
    columns = zip(heads, *([len(plain(cell)) for cell in row] for row in rows), strict=True)
    longest = [max(column) for column in columns]
    first, beside = longest[0], sum(3 + min(length, 64) for length in longest[1:])
    fits = min(first, 18) + beside <= _PHONE, min(first, 24) + beside <= _PAPER
    kind = "phone" if fits[0] else "paper" if fits[1] else "screen"
    cell = max(6, *(min(13, length) for length in longest[1:])) if longest[1:] else 6

    def line(cells: Sequence[str]) -> str:
        named = [f' data-of="{_escaped(name)}"' if name else "" for name in ("", *header[1:])]
        marks = [' class="long"' if len(cell) > _LONG else "" for cell in cells]
        parts = zip(marks, named, cells, strict=True)
        return "".join(f"<td{mark}{of}>{_together(_escaped(cell))}</td>" for mark, of, cell in parts)

    head = "".join(f"<th>{_escaped(name)}</th>" for name in header)
    body = "\n".join(f"<tr>{line(row)}</tr>" for row in rows)
    return (
        f'<div class="wide {kind}" style="--cell: {cell}ch" tabindex="0"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _picture(picture: Picture, numbers: Iterator[int]) -> str:
    if picture.panels:
        panels = (svg(panel, f"p{next(numbers)}") for panel in picture.panels)
        return '<div class="panels">\n' + "\n".join(panels) + "\n</div>"
    data = base64.b64encode(picture.path.read_bytes()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{_escaped(picture.text)}">'


def _element(block: Block, numbers: Iterator[int]) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_escaped(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_escaped(text)}</p>"
        case Quote(text):
            return f"<blockquote>{_escaped(text)}</blockquote>"
        case Code(text):
            return f'<pre tabindex="0">{html.escape(text)}</pre>'
        case Table(header, rows):
            return _table(header, rows)
        case Glance(sentences, picture):
            paragraphs = (f"<p><b>{name}:</b> {_escaped(said)}</p>" for name, said in sentences.items())
            said = "\n".join(paragraphs)
            image = "" if picture is None else _picture(picture, numbers)
            return f'<div class="glance">\n<div>\n{said}\n</div>\n{image}\n</div>'
        case Picture():
            return _picture(block, numbers)


def to_html(blocks: Sequence[Block]) -> str:
    """The document as one HTML page, its pictures within; the first block is its title."""
    assert isinstance(blocks[0], Heading)
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{_escaped(blocks[0].text)}</title>\n<style>{_STYLE}</style>"
    )
    numbers = count(1)
    body = "\n".join(_element(block, numbers) for block in blocks)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def write_document(folder: Path, blocks: Sequence[Block]) -> None:
    """Write ``report.md`` and ``report.html`` to ``folder``, where the document's pictures are."""
    write_whole(folder / "report.md", to_markdown(blocks))
    write_whole(folder / "report.html", to_html(blocks))
