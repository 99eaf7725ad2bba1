"""What timed decoding says: a table of ways, and their picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spiking_mamba.evaluation.statistics import median_interval
from spiking_mamba.reports.document import markdown_table
from spiking_mamba.reports.figures import COLOURS, picture

__all__ = ["draw_speeds", "speed_table"]

_KINDS = {"llama.cpp": "0.6", "dense": COLOURS[0], "event-driven": COLOURS[1], "spiking": COLOURS[2]}


def speed_table(results: Mapping[str, Any]) -> str:
    """The results of ``spiking-mamba bench`` in Markdown.

    How much faster a way is: the median of the quotients within a repeat, in which all ways ran one behind
    another, and the interval of that median.

    Args:
        results: ``title``; ``over``, the way that others are compared with; ``decoding``, the records of
            :func:`spiking_mamba.evaluation.cpu_speed.measure`.
    """
    rows, over = results["decoding"], results["over"]
    reference = np.array(next(row["times"] for row in rows if row["way"] == over))
    counted = any("joules" in row for row in rows)
    body = []
    for row in rows:
        faster = reference / np.array(row["times"])
        bounds = median_interval(faster) if row["way"] != over else None
        share = row.get("share")
        cells = [row["way"], f"{1 / row['seconds']:.1f}", f"{1e3 * row['seconds']:.3f}"]
        cells += [f"{np.median(faster):.2f}", "" if bounds is None else f"{bounds[0]:.2f} to {bounds[1]:.2f}"]
        cells += ["" if share is None else f"{share:.0%}", f"{row['prompt_tokens_per_second']:.0f}"]
        body.append([*cells, *([f"{1e3 * row['joules']:.1f}"] if counted else [])])
    heads = ["decoding", "tokens/s", "ms a token", f"over {over}", "95% interval", "weights fetched"]
    heads += ["prompt tokens/s", *(["mJ a token"] if counted else [])]
    return f"{results['title']}\n\n{markdown_table(heads, body)}"


def draw_speeds(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Tokens a second as bars, what others offer in grey.

    Args:
        rows: records with ``way`` and ``seconds``, those of a token.
        title: above the bars.
        path: of a PNG.
    """
    with picture(path, 8, 0.8 + 0.36 * len(rows)) as (_, axes):
        names = [row["way"] for row in rows]
        bars = axes.barh(
            names,
            [1 / row["seconds"] for row in rows],
            color=[next(c for kind, c in _KINDS.items() if name.startswith(kind)) for name in names],
        )
        axes.bar_label(bars, fmt="%.0f", padding=3)
        axes.invert_yaxis()
        axes.set_xlabel("tokens a second")
        axes.set_title(title)
        axes.margins(x=0.1)
