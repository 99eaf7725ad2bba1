"""The frame that every picture is drawn in: as a PNG, and as SVG within a page.

Colours are such that colour-blind readers can tell them apart. Names are drawn as they are, cut in the middle
when long.
"""

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure, FigureBase

__all__ = [
    "COLOURS",
    "MARKERS",
    "REFERENCE",
    "Panel",
    "picture",
    "plain",
    "short",
    "svg",
    "unit",
    "write_png",
]

# Okabe and Ito's palette without black, which marks the reference, and without yellow, too pale on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
REFERENCE: dict[str, Any] = {"color": "black", "marker": "*", "markersize": 13}
WIDTH = 5.0  # inches of a panel: 360 points, about as many as a telephone has
_FAINT = "#e5e5e5"  # of grids
_LETTERS = {"font.size": 12, "axes.edgecolor": "#8a8f94", "grid.color": _FAINT}
_UNITS = ((1e12, "J"), (1e9, "mJ"), (1e6, "µJ"), (1e3, "nJ"), (1.0, "pJ"))


def plain(text: object) -> str:
    """One line of valid Unicode, for control characters and halves of surrogate pairs may come in names."""
    line = "".join(c if c.isprintable() else " " for c in str(text))
    return " ".join(line.split())


def short(name: str, length: int = 34) -> str:
    """A name that fits a picture.

    It never starts with an underscore, which matplotlib leaves out of legends.
    """
    name = plain(name)
    if len(name) > length:
        name = name[: length // 2 - 1] + "…" + name[-(length // 2) :]
    return " " + name if name.startswith("_") else name


def unit(picojoules: float) -> tuple[float, str]:
    """The unit to show an energy in, and how many picojoules it is."""
    return next((u for u in _UNITS if picojoules >= u[0]), _UNITS[-1])


@dataclass(frozen=True)
class Panel:
    """A part of a picture: beside others in a PNG, and on its own in a page, where they reflow.

    All are :data:`WIDTH` wide, so that letters have the same size everywhere.

    Attributes:
        text: what it shows, for those who cannot see it.
        height: in inches.
        draw: draws it into a figure, or into a part of one.
    """

    text: str
    height: float
    draw: "Callable[[FigureBase], Any]"


@contextlib.contextmanager
def _figure(width: float, height: float, **style: Any) -> "Iterator[Figure]":
    """An empty figure; nothing of matplotlib's global state is left changed."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ours: dict[Any, Any] = {
        "text.parse_math": False,  # a name may hold dollar signs
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titlesize": "medium",
        "axes.axisbelow": True,
        "font.size": 10,
    }
    with rc_context(ours | style):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def _save(figure: "Figure", path: Path, dpi: int) -> None:
    _plain_ticks(figure)
    draft = path.with_name(path.stem + ".part.png")
    figure.savefig(draft, dpi=dpi)
    draft.replace(path)


@contextlib.contextmanager
def picture(
    path: Path, width: float, height: float, *, dpi: int = 130, **grid: Any
) -> "Iterator[tuple[Figure, Any]]":
    """A figure of ``width`` x ``height`` inches and its axes (``Figure.subplots``).

    It is written to ``path`` as a PNG at the end of the block, whole or not at all.

    Nothing of matplotlib's global state is left changed, so that a program's own figures stay as they are.
    """
    with _figure(width, height) as figure:
        yield figure, figure.subplots(**grid)
        _save(figure, path, dpi)


def write_png(path: Path, panels: Sequence[Panel], dpi: int = 130) -> None:
    """Draw panels to a PNG, two beside one another, whole or not at all."""
    columns = min(2, len(panels))
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [max(panel.height for panel in row) for row in rows]
    with _figure(columns * WIDTH, sum(heights), **_LETTERS) as figure:
        grid: dict[str, Any] = {"squeeze": False, "height_ratios": heights}
        parts = figure.subfigures(len(rows), columns, **grid).flat
        for part, panel in zip(parts, panels, strict=False):
            panel.draw(part)
        _save(figure, path, dpi)


def svg(panel: Panel, name: str) -> str:
    """A panel as an SVG element to stand within a page, whose colour and font it takes.

    Args:
        panel: what to draw.
        name: what its ids begin with; unlike any other's in the page.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    # texts stay texts, and what is named by chance is named by the salt
    style = {"svg.fonttype": "none", "svg.hashsalt": "report", "figure.dpi": 144}
    written = io.StringIO()
    with _figure(WIDTH, panel.height, **style | _LETTERS) as figure:
        panel.draw(figure)
        figure.patch.set_visible(False)
        for axes in figure.axes:
            axes.patch.set_visible(False)
        _plain_ticks(figure)
        FigureCanvasSVG(figure).print_svg(written, metadata={"Date": None})
    return _inline(written.getvalue(), panel.text, name)


def _inline(document: str, text: str, name: str) -> str:
    """matplotlib's file as an element: sized by the page, in its colours, with ids of its own."""
    space = "{http://www.w3.org/2000/svg}"
    ElementTree.register_namespace("", space[1:-1])
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(document)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{space}metadata", f"{space}style"):
                parent.remove(child)
    asked = set(re.findall(r'(?:href="|url\()#([^")]+)', document))
    for element in root.iter():
        if element.attrib.get("id") not in asked:
            element.attrib.pop("id", None)
        for key, value in element.attrib.items():
            element.set(key, name + "-" + value if key == "id" else _restyled(value, name))
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": plain(text)}
    return ElementTree.tostring(root, encoding="unicode")


def _restyled(value: str, name: str) -> str:
    """An attribute with fewer digits, colours and font of the page, and ids that begin with ``name``."""
    if value.startswith("data:"):
        return value
    value = re.sub(r"^#|(?<=url\()#", f"#{name}-", value)
    value = re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", value)
    value = re.sub(r"font: (?:\w+ )*([\d.]+px) [^;]*", r"font-size: \1", value)
    return value.replace("#000000", "currentColor").replace(_FAINT, "var(--line)")


def _plain_ticks(figure: "Figure") -> None:
    """Label logarithmic axes 0.1, 1, 10: as text is drawn as it is, powers of ten would be seen as TeX."""
    from matplotlib.ticker import LogFormatter, LogFormatterMathtext

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: Any = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""  # it leaves some out on long axes

    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        if isinstance(axis.get_major_formatter(), LogFormatterMathtext):
            axis.set_major_formatter(Plain())
        if isinstance(axis.get_minor_formatter(), LogFormatterMathtext):
            axis.set_minor_formatter(Plain())
