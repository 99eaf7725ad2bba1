"""Write docs/results.md from the rows that recipes/ablate/study.py has measured.

python recipes/ablate/results.py recipes/ablate/results.yaml
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from study import DRIVEN_ROWS, OUTSIDE, Table, result_path, tokens_seen

from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.files import write_whole
from spiking_mamba.common.interruption import interruptible
from spiking_mamba.common.settings import is_list_of, parse_settings
from spiking_mamba.evaluation.statistics import interval
from spiking_mamba.reports.document import Block, Code, Heading, Paragraph, Picture, to_markdown
from spiking_mamba.reports.document import Table as Cells
from spiking_mamba.reports.figures import COLOURS, MARKERS, picture

RATE = 500_000  # tokens a second of student steps with their teacher on an H200, processes together
AROUND = 10.0  # seconds a row takes besides training
TARGET_GAIN, TARGET_GAP = 4.76, 0.03
WIDEST = 20.0  # gain that is drawn
PERPLEXITY = ("after", "perplexity")


@dataclass
class ResultsSettings:
    """Settings of the page; every field is a key of the YAML file.

    Attributes:
        tables: the YAML files of the tables, in the order of the page.
        page: the Markdown file to write; its picture stands beside it.
        results: folder of the rows' results; null: where each table says.
    """

    tables: Any
    page: str = "docs/results.md"
    results: Any = None

    def __post_init__(self) -> None:
        self.tables = [self.tables] if isinstance(self.tables, str) else self.tables
        if not is_list_of(self.tables, str):
            raise ValueError(f"tables must be a list of YAML files, got {self.tables!r}.")


@dataclass
class Row:
    """A row of a table and what its seeds gave."""

    table: Table
    row: dict[str, Any]
    runs: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.row["name"]

    @property
    def lever(self) -> str:
        """By what the picture groups it: its lever, or its table."""
        return self.row.get("lever", self.table.name)

    @property
    def seeds(self) -> list[int]:
        return list(self.row.get("seeds", self.table.seeds))

    @property
    def tokens(self) -> int:
        return tokens_seen(self.table.settings(self.row))

    @property
    def dense(self) -> bool:
        return self.table.settings(self.row).neuron is None

    @property
    def done(self) -> list[dict[str, Any]]:
        return [run for run in self.runs if run["status"] == "done"]

    def values(self, *path: str) -> list[float]:
        """A number of every finished run, those that have it; ``"after", "gain", "fp32"``, say."""
        found = []
        for run in self.done:
            value: Any = run
            for key in path:
                value = None if value is None else value.get(key)
            if value is not None:
                found.append(value)
        return found

    def over(self, control: "Row | None") -> list[float]:
        """Perplexity over the mean of a control or any other row, less 1; over the teacher's for ``None``."""
        if control is None:
            return [r["after"]["perplexity"] / r["teacher"]["perplexity"] - 1 for r in self.done]
        mean = interval(control.values(*PERPLEXITY))["mean"]
        return [value / mean - 1 for value in self.values(*PERPLEXITY)]


def read(table: Table) -> list[Row]:
    """Every row with those of its runs that were made with the settings which the table has now."""
    rows = []
    for row in table.rows:
        found = []
        for seed in row.get("seeds", table.seeds):
            path = result_path(table, row, seed)
            if path.is_file():
                try:
                    run = json.loads(path.read_text())
                    run["settings"], run["status"]
                except (ValueError, TypeError, KeyError) as error:
                    raise ValueError(f"{path} is no result of study.py: {error!r}") from error
                wanted = {k: v for k, v in asdict(table.settings(row, seed)).items() if k not in OUTSIDE}
                if run["settings"] == json.loads(json.dumps(wanted)):
                    found.append(run)
        rows.append(Row(table, row, found))
    return rows


def best_control(rows: Sequence[Row], tokens: int) -> Row | None:
    """The dense control of as many tokens whose perplexity is lowest."""
    controls = [row for row in rows if row.dense and row.tokens == tokens and row.done]
    return min(controls, key=lambda row: interval(row.values(*PERPLEXITY))["mean"], default=None)


def spread(values: Sequence[float], form: str, scale: float = 1.0) -> str:
    """Mean, standard deviation and 95 % interval, as far as there are runs for them."""
    if not values:
        return ""
    found = interval([scale * value for value in values])
    if found["sd"] is None:
        return f"{found['mean']:{form}}"
    return f"{found['mean']:{form}} ± {found['sd']:.2g} [{found['low']:{form}}, {found['high']:{form}}]"


def cells(row: Row, controls: Sequence[Row]) -> list[str]:
    control = best_control(controls, row.tokens) if row.tokens else None
    troubles = sorted({run["status"] for run in row.runs if run["status"] != "done"})
    state = f"{len(row.done)} of {len(row.seeds)}"
    of_control = spread(row.over(control), "+.2f", 100.0) if control is not None else ""
    return [
        row.name,
        ", ".join([state, *troubles]),
        f"{row.tokens / 1e6:.1f}",
        one(row.values("before", "perplexity"), ".2f"),
        spread(row.values(*PERPLEXITY), ".3f"),
        spread(row.over(None), "+.2f", 100.0),
        of_control,
        spread(row.values("after", "mean_abs"), ".3f"),
        spread(row.values("after", "gain", "fp32"), ".2f"),
        one(row.values("after", "gain", "quantised_sparse"), ".2f"),
        one(row.values("after", "gain_whole_model_fp32"), ".2f"),
        one(row.values("after", "nonzero_share"), ".3f"),
    ]


def one(values: Sequence[float], form: str) -> str:
    return f"{interval(values)['mean']:{form}}" if values else ""


HEADER = [
    "row",
    "seeds run",
    "M tokens",
    "perplexity before",
    "after",
    "over the teacher, %",
    "over the control, %",
    "mean abs s",
    "gain fp32",
    "over quantised, sparse",
    "whole model fp32",
    "non-zero",
]


def section(table: Table, rows: Sequence[Row], everything: Sequence[Row], path: str) -> list[Block]:
    blocks: list[Block] = [Heading(table.title), Paragraph(table.about)]
    blocks.append(Code(f"python recipes/ablate/study.py {path}"))
    if body := [cells(row, everything) for row in rows if row.runs]:
        blocks.append(Cells(HEADER, body))
    if missing := [f"{row.name} ({row.tokens / 1e6:.1f}M tokens)" for row in rows if not row.runs]:
        blocks.append(Paragraph(f"Planned, not run: {'; '.join(missing)}."))
    if body := changes(table, rows):
        blocks.append(Cells(["change", "against", "perplexity, %", "gain fp32"], body))
    run = {row.name for row in rows if row.runs}
    blocks += [Paragraph(found["text"]) for found in table.findings if run.issuperset(found["rows"])]
    checked = [(row, name) for row in rows for name in row.row.get("checks", table.checks) if row.done]
    if checked:
        body = [
            [
                row.name,
                f"{name}, {DRIVEN_ROWS} rows" if name == "spike_driven" else name,
                *(one(row.values("checks", name, key), ".4f") for key in ("without", "perplexity")),
            ]
            for row, name in checked
        ]
        blocks.append(Cells(["row", "check", "perplexity as it is", "so changed"], body))
    if found := [run for row in rows for run in row.runs]:
        machines = sorted({run["hardware"]["device"] for run in found})
        dates = {run["date"][:10] for run in found}
        when = " to ".join(sorted({min(dates), max(dates)}))
        torches = sorted({str(run["versions"]["torch"]) for run in found})
        minutes = sum(run["seconds"] for run in found) / 60
        tokens = {run["held_out_tokens"] for run in found if "held_out_tokens" in run}
        text = (
            f"{len(found)} runs, {minutes:.1f} minutes on {', '.join(machines)}; {when}; "
            f"torch {', '.join(torches)}; {', '.join(f'{n:,}' for n in sorted(tokens))} held-out tokens."
        )
        blocks.append(Paragraph(text))
    if table.claims:
        blocks.append(
            Cells(["the source's claim", "here"], [[c["claim"], verdict(c, rows)] for c in table.claims])
        )
    return blocks


def changes(table: Table, rows: Sequence[Row]) -> list[list[str]]:
    """What each change gave: by how much the mean perplexity is higher, and the gain before and after."""
    by_name, body = {row.name: row for row in rows}, []
    for lever in table.levers:
        row, against = by_name[lever["row"]], by_name[lever["against"]]
        if row.done and against.done:
            gains = (one(r.values("after", "gain", "fp32"), ".2f") for r in (against, row))
            change = spread(row.over(against), "+.2f", 100.0)
            body.append([lever["change"], against.name, change, " to ".join(gains)])
    return body


def verdict(claim: dict[str, Any], rows: Sequence[Row]) -> str:
    """What the table says of a claim: nothing before every row that it rests on was run."""
    by_name = {row.name: row for row in rows}
    if not claim.get("rows"):
        return claim["verdict"]  # one that cannot be seen at this scale rests on no row
    if not all(by_name[name].runs for name in claim["rows"]):
        return "Not yet run."
    return claim.get("verdict") or "Run, not yet judged."


def plan(tables: Sequence[tuple[str, Table, list[Row]]]) -> list[Block]:
    body, total = [], 0.0
    for path, _, rows in tables:
        minutes = sum(len(row.seeds) * (row.tokens / RATE + AROUND) for row in rows) / 60
        spent = sum(run["seconds"] for row in rows for run in row.runs) / 60
        wanted, done = sum(len(row.seeds) for row in rows), sum(len(row.runs) for row in rows)
        total += minutes
        tokens = sum(len(row.seeds) * row.tokens for row in rows) / 1e6
        body.append([path, f"{wanted}", f"{tokens:.0f}", f"{minutes:.0f}", f"{done}", f"{spent:.1f}"])
    header = ["table", "runs planned", "M tokens", "minutes planned", "runs made", "minutes taken"]
    text = (
        f"GPU time is short, so every run is small. The budget: {total:.0f} minutes of one H200, at "
        f"{RATE // 1000}k tokens/s (student steps with the teacher's forward passes, 7.1M parameters; what "
        f"processes that share it see together) and {AROUND:.0f} seconds around each run. Minutes taken are "
        "each process's own, of up to six that shared a GPU (conversion: on a CPU). Tables stand in the "
        "order of their importance."
    )
    return [Heading("Plan"), Paragraph(text), Cells(header, body)]


def answer(rows: Sequence[Row]) -> str:
    """Whether the target is met: the best row at or above the target's gain."""
    candidates = []
    for row in rows:
        control = best_control(rows, row.tokens)
        gains = row.values("after", "gain", "fp32")
        if not row.dense and control is not None and gains and interval(gains)["mean"] >= TARGET_GAIN:
            candidates.append((interval(row.over(control))["mean"], row, control))
    if not candidates:
        return "No student with a gain of at least 4.76x has a control of as many tokens beside it yet."
    gap, row, control = min(candidates, key=lambda found: found[0])
    reached = "met" if gap <= TARGET_GAP else "not met"
    return (
        f"The target, at most {TARGET_GAP:.0%} above the dense control's perplexity at a projection-energy "
        f"gain of at least {TARGET_GAIN}x (fp32 table), is {reached}: '{row.name}' stands {100 * gap:+.2f} "
        f"% from '{control.name}' at {interval(row.values('after', 'gain', 'fp32'))['mean']:.2f}x, "
        f"{seeds(row)} against {seeds(control)} of the control. Over the teacher as it is, from which both "
        f"start, the control stands {100 * of_teacher(control):+.2f} %, the student "
        f"{100 * of_teacher(row):+.2f} %: over that dense model the target would be "
        f"{'met' if of_teacher(row) <= TARGET_GAP else 'missed'}."
    )


def seeds(row: Row) -> str:
    return f"{len(row.done)} seed{'s' if len(row.done) > 1 else ''}"


def of_teacher(row: Row) -> float:
    return interval(row.over(None))["mean"]


def non_dominated(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of ``(gain, gap)`` those that no other has a larger gain and a smaller gap than, by their gains."""
    best: list[tuple[float, float]] = []
    for gain, gap in sorted(points, key=lambda point: (-point[0], point[1])):
        if not best or gap < best[-1][1]:
            best.append((gain, gap))
    return best[::-1]


def draw(path: Path, rows: Sequence[Row]) -> bool:
    """Perplexity over the control's against the energy gain, a colour a lever; whether there was a point."""
    points = []
    for row in rows:
        control = best_control(rows, row.tokens) if row.tokens else None
        gaps, gains = row.over(control), row.values("after", "gain", "fp32")
        if not row.dense and gaps and len(gains) == len(gaps) and row.tokens:
            points.append((row, [100 * gap for gap in gaps], gains, control is not None))
    if not points:
        return False
    levers = list(dict.fromkeys(row.lever for row, *_ in points))
    with picture(path, 8.5, 5.2) as (figure, axes):
        for place, lever in enumerate(levers):
            look = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
            chosen = [point for point in points if point[0].lever == lever]
            label: str | None = lever
            for row, gaps, gains, controlled in chosen:
                size = 5 + 1.5 * math.log2(max(1.0, row.tokens / 8e6))
                bars = interval(gaps)
                half = None if bars["sd"] is None else bars["high"] - bars["mean"]
                fill = {} if controlled else {"markerfacecolor": "none"}
                axes.errorbar(
                    interval(gains)["mean"], bars["mean"], half, linestyle="none", capsize=3,
                    markersize=size, label=label, **look, **fill,
                )  # fmt: skip
                label = None
        means = [(interval(gains)["mean"], interval(gaps)["mean"]) for _, gaps, gains, _ in points]
        # steps: between two students nothing was run
        axes.step(
            *zip(*non_dominated(means), strict=True), where="pre", color="silver", linewidth=1.5, zorder=0,
            label="best with that gain or more",
        )  # fmt: skip
        axes.axvline(TARGET_GAIN, color="grey", linewidth=0.8, linestyle="--")
        axes.axhline(100 * TARGET_GAP, color="grey", linewidth=0.8, linestyle="--")
        axes.axhline(0.0, color="black", linewidth=0.8)
        # a row that went wrong would squeeze all others into a line
        heights = sorted(gap for _, gap in means)
        top = 1.15 * max(100 * TARGET_GAP, min(heights[-1], 3 * heights[len(heights) // 2]))
        right = 1.1 * max((g for _, _, gains, _ in points for g in gains if g <= WIDEST), default=WIDEST)
        axes.set(xlim=(0.0, right), ylim=(min(-0.5, 1.1 * heights[0]), top))
        axes.text(TARGET_GAIN, top, f" {TARGET_GAIN}x", color="grey", va="top")
        axes.text(right, 100 * TARGET_GAP, f"{TARGET_GAP:.0%}", color="grey", ha="right", va="bottom")
        outside = sum(gap > top or gain > right for gain, gap in means)
        note = "Larger marks: more tokens. Conversions are not shown"
        axes.set_title(note + (f"; {outside} rows lie outside." if outside else "."), fontsize=9)
        axes.grid(color="#e5e5e5")
        axes.set(
            xlabel="energy gain of the projections over the dense model, times (fp32 table)",
            ylabel="perplexity over the dense control's, %\n(hollow: over the teacher's, for want of one)",
        )
        figure.legend(loc="outside lower left", ncols=4, frameon=False, fontsize=9)
    return True


def write(settings: ResultsSettings) -> None:
    tables = []
    for path in settings.tables:
        override = [] if settings.results is None else [f"results={settings.results}"]
        table = parse_settings(Table, [path, *override])
        tables.append((path, table, read(table)))
    rows = [row for _, _, found in tables for row in found]
    blocks: list[Block] = [
        Heading("Results", 1),
        Paragraph(
            "What the source (SpikingMamba, arXiv 2510.04595) claims, measured on our own teacher as far "
            "as it can be seen at this scale. Written by recipes/ablate/results.py from the files in "
            "docs/results, one a run: there is no number without a run behind it."
            + ("" if any(row.runs for row in rows) else " Nothing has been run yet: this is the plan.")
        ),
        *plan(tables),
        Paragraph(answer(rows)),
    ]
    image = Path(settings.page).with_name("frontier.png")
    image.parent.mkdir(parents=True, exist_ok=True)
    if draw(image, rows):
        blocks.append(Picture(image, "Perplexity over the dense control's against energy gain"))
    blocks += [Heading("How to read the tables"), Paragraph(READING)]
    for path, table, found in tables:
        blocks += section(table, found, rows, path)
    write_whole(Path(settings.page), to_markdown(blocks))
    print(f"{settings.page}: {sum(len(row.runs) for row in rows)} runs")


READING = (
    "Perplexity is that of the held-out documents, in float32. The control is the dense teacher trained "
    "further on as many tokens, the best of those with as many; 'over' is by how much a perplexity is "
    "higher. Mean abs s is weighted by output width. Gains are dense MACs over accumulations, counted "
    "in the very same forward passes (docs/energy.md): at fp32 5.11 over mean abs s; at fp16 3.75 and "
    "at int8 7.67 over it, hypothetical, since the accuracy is that of float32. 'Over quantised, "
    "sparse' is against a network of the same 2D + 1 levels with int8 weights that skips zeros, int8 "
    "table. Of several seeds: mean ± standard deviation [95 % interval by Student's t] of the row's own "
    "seeds; what it is held against is taken at its mean. Seeds of a student have a standard deviation "
    "of 0.08 % (0.02 to 0.19 %; I-LIF 0.6 %, LIF 20 %), so between two rows with one seed each, "
    "differences below 0.25 % mean nothing. 'Before' is converted and not trained."
)


@fail_clearly()
def main() -> None:
    settings = parse_settings(ResultsSettings, description=__doc__)
    with interruptible(lambda: f"{settings.page} is as it was; the same command writes it."):
        write(settings)


if __name__ == "__main__":
    main()
