"""Tables and pictures of the records of gpu_decoding.py and gpu_projections.py."""

from pathlib import Path
from typing import Any

from spiking_mamba.reports.document import markdown_table
from spiking_mamba.reports.figures import COLOURS, MARKERS, picture

BF16, INT8, EVERY = "dense bf16", "dense int8", "event-driven, 100%"
TRAINED = "as trained"


def table(records: list[dict[str, Any]]) -> str:
    """A size's records at batch 1, then its growth with the batch, then what integers and zeros give."""
    own = {(r["way"], r["batch"]): r for r in records}
    ways, batches = (list(dict.fromkeys(r[key] for r in records)) for key in ("way", "batch"))
    smallest = min(batches)

    def over(way: str, other: str) -> str:
        one, two = own.get((other, smallest)), own.get((way, smallest))
        return f"{one['seconds'] / two['seconds']:.2f}" if one and two else "-"

    rows = []
    for way in ways:
        if (r := own.get((way, smallest))) is None:
            continue
        floor = r["bytes"] / r["copy_bytes_per_second"] if r.get("copy_bytes_per_second") else None
        rows.append(
            [
                way, f"{smallest / r['seconds']:.0f}", f"{1e3 * r['seconds']:.3f}",
                f"{r['replay_ms']:.3f}" if "replay_ms" in r else "-", over(way, BF16),
                "-" if r["share"] is None else f"{r['share']:.2f}", f"{r['bytes'] / 1e6:.0f}",
                "-" if floor is None else f"{floor / r['seconds']:.0%}",
                *(f"{r[key]:.0f}" if key in r else "-" for key in ("mJ", "mJ_net", "idle_watts")),
            ]
        )  # fmt: skip
    head = ["tokens/s", "ms a token", "its graph alone", "speed / dense bf16", "share fetched", "MB a token"]
    head += ["of its floor", "mJ a token", "idle taken off", "idle W"]
    text = markdown_table([f"{records[0]['size']}, batch {smallest}", *head], rows)
    if len(batches) > 1:
        grown = [
            [way, *(f"{b / own[way, b]['seconds']:.0f}" if (way, b) in own else "-" for b in batches)]
            for way in ways
        ]
        text += "\n\n" + markdown_table(["tokens/s", *(f"batch {b}" for b in batches)], grown)
    integers = next((way for way in ways if way.startswith("dense int")), None)
    if integers is not None and (BF16, smallest) in own:
        text += f"\n\nIntegers and fewer launches give {over(integers, BF16)} times dense bf16's speed."
        if (EVERY, smallest) in own:
            rest = [w for w in ways if w.startswith("event-driven, ") and w != EVERY and "generate" not in w]
            each = ", ".join(f"{w.removeprefix('event-driven, ')}: {over(w, EVERY)}" for w in rest)
            text += f" Zeros, over the same kernels where all inputs fire: {each}."
    return text


def projections_table(record: dict[str, Any], weights: tuple[str, ...] = ("int8", "int4")) -> str:
    """A record of gpu_projections.py: cuBLAS, and event-driven with these weights."""
    rows, base = [], record["rows"][0]
    for r in record["rows"]:
        if r is base or r["way"].startswith(weights):
            joules = [f"{r[key]:.0f}" if key in r else "-" for key in ("mJ", "mJ_net")]
            rows.append(
                [r["way"], f"{r['ms']:.3f}", f"{base['ms'] / r['ms']:.2f}", f"{r['of_copy']:.0%}", *joules]
            )
    asked = record["provenance"]["settings"]
    head = [f"projections, {asked['size']}, batch {asked['batch']}", "ms a token", "speed / bf16"]
    return markdown_table([*head, "of copy bandwidth", "mJ a token", "idle taken off"], rows)


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Tokens a second, joules where they were counted, and growth with the batch where there are several."""
    batches = sorted({r["batch"] for r in records})
    first = [r for r in records if r["batch"] == batches[0]]
    counted = [r for r in first if "mJ" in r]
    panels = 1 + bool(counted) + (len(batches) > 1)
    height = 1.4 + 0.4 * max(6 if len(batches) > 1 else 3, len(first))
    with picture(path, 1 + 5.0 * panels, height, ncols=panels, squeeze=False) as (_, axes):
        rest = list(axes[0])
        _bars(rest.pop(0), first, [r["batch"] / r["seconds"] for r in first])
        axes[0][0].set_title(f"{records[0]['size']}, batch {batches[0]}: tokens a second")
        if counted:
            panel = rest.pop(0)
            _bars(panel, counted, [r["mJ"] for r in counted])
            panel.barh([r["way"] for r in counted], [r["mJ_net"] for r in counted], color=COLOURS[1])
            panel.set_title("millijoules a token, less idle in orange")
        if len(batches) > 1:
            _growth(rest.pop(0), records)


def _bars(panel: Any, records: list[dict[str, Any]], values: list[float]) -> None:
    bars = panel.barh([r["way"] for r in records], values, color=COLOURS[0])
    panel.bar_label(bars, fmt="%.0f", padding=3)
    panel.invert_yaxis()
    panel.margins(x=0.15)


def _growth(panel: Any, records: list[dict[str, Any]]) -> None:
    # generate()'s scatter: a prompt's time is in them
    ways = dict.fromkeys(r["way"] for r in records if "generate()" not in r["way"])
    for number, way in enumerate(ways):
        own = sorted((r["batch"], r["batch"] / r["seconds"]) for r in records if r["way"] == way)
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        panel.plot(*zip(*own, strict=True), label=way, **style)
    panel.set_xlabel("sequences at a time")
    panel.set_title("tokens a second, all sequences")
    panel.legend(frameon=False, fontsize=8)
