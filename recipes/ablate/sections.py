"""What docs/results.md says of one table: its rows, changes, findings, checks and claims."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from placeholders import fill, rows_named
from recorded import PERPLEXITY, Row, best_dense, change, marked
from table import DRIVEN_ROWS, Table

from spiking_mamba.common.keys import reject_unknown_keys
from spiking_mamba.common.provenance import MARK, is_clean
from spiking_mamba.evaluation.statistics import interval
from spiking_mamba.reports.document import Block, Code, Heading, Paragraph
from spiking_mamba.reports.document import Table as Cells

__all__ = ["section"]

HEADER = [
    "row",
    "seeds run",
    "M tokens",
    "perplexity before",
    "after",
    "over the best dense, %",
    "mean abs s",
    "non-zero",
    "projections",
    "with neurons",
    "whole model",
    "decoding",
    "int8, over quantised, sparse",
]

# beside perplexity, in tables that have them
TO_TEACHER = ["KL to the teacher, nats", "same likeliest token, %"]
PLACE = HEADER.index("mean abs s")

Tables = Mapping[str, Sequence[Row]]


def section(table: Table, tables: Tables, path: str) -> list[Block]:
    """The section of a table.

    Args:
        table: what it is made of.
        tables: the rows of all tables on the page by the tables' names: a text may name those of others.
        path: of the table's YAML file.
    """
    rows = tables[table.name]
    alike = [row for rows in tables.values() for row in rows if row.table.teacher == table.teacher]
    find = finder(table, tables)
    blocks: list[Block] = [Heading(table.title), Paragraph(table.about)]
    blocks.append(Code(f"python recipes/ablate/study.py {path}"))
    if body := [cells(row, alike) for row in rows if row.runs]:
        header = HEADER
        if any(row.values("after", "kl") for row in rows):
            header = [*HEADER[:PLACE], *TO_TEACHER, *HEADER[PLACE:]]
            near = [to_teacher(row) for row in rows if row.runs]
            body = [[*each[:PLACE], *own, *each[PLACE:]] for each, own in zip(body, near, strict=True)]
        blocks.append(Cells(header, body))
    if missing := [f"{row.name} ({row.tokens / 1e6:.1f}M tokens)" for row in rows if not row.runs]:
        blocks.append(Paragraph(f"Planned, not run: {'; '.join(missing)}."))
    if body := changes(table, find):
        blocks.append(Cells(["change", "against", "perplexity, %", "gain fp32"], body))
    texts = [filled(finding["text"], finding.get("rows", []), find) for finding in table.findings]
    blocks += [Paragraph(text) for text in texts if text is not None]
    if body := checks(table, rows):
        blocks.append(Cells(["row", "check", "perplexity as it is", "so changed"], body))
    if runs := [run for row in rows for run in row.runs]:
        blocks.append(Paragraph(origin(runs)))
    if table.claims:
        verdicts = [[claim["claim"], verdict(claim, find)] for claim in table.claims]
        blocks.append(Cells(["the source's claim", "here"], verdicts))
    return blocks


def finder(table: Table, tables: Tables) -> Callable[[str], Row]:
    """Gives the row of a name as this table's texts write it, ``name`` or ``table::name``."""

    def find(name: str) -> Row:
        where, _, own = name.rpartition("::")
        reject_unknown_keys({where or table.name: 0}, tables, f"a text of {table.name}")
        by_name = {row.name: row for row in tables[where or table.name]}
        reject_unknown_keys({own: 0}, by_name, f"a text of {table.name}")
        return by_name[own]

    return find


def filled(text: str, others: Sequence[str], find: Callable[[str], Row]) -> str | None:
    """A text with its numbers; None before every row that it names, or rests on beside, was run."""
    named, beside = ([find(name) for name in names] for names in (rows_named(text), others))
    if not all(row.done for row in named) or not all(row.runs for row in beside):
        return None
    return marked(fill(text, find), [*named, *beside])


def verdict(claim: dict[str, Any], find: Callable[[str], Row]) -> str:
    """What the table says of a claim. One that rests on no row cannot be seen at this scale."""
    text = filled(claim.get("verdict", "Run, not yet judged."), claim.get("rows", []), find)
    return "Not yet run." if text is None else text


def spread(statistics: Mapping[str, Any], form: str, scale: float = 1.0) -> str:
    """Mean and 95 % interval, where there is one, see :func:`interval`."""
    mean = f"{scale * statistics['mean']:{form}}"
    if statistics["low"] is None:
        return mean
    return f"{mean} [{scale * statistics['low']:{form}}, {scale * statistics['high']:{form}}]"


def mean(values: Sequence[float], form: str) -> str:
    return f"{interval(values)['mean']:{form}}" if values else ""


def cells(row: Row, alike: Sequence[Row]) -> list[str]:
    troubles = sorted({run["status"] for run in row.runs if run["status"] != "done"})
    state = f"{len(row.done)} of {len(row.seeds)}"
    after = row.values(*PERPLEXITY)
    over = spread(row.over(best_dense(alike)), "+,.2f", 100.0) if after else ""
    gains = ("with_neurons", "whole_model", "decoding", "quantised")
    return [
        row.label,
        ", ".join([state, *troubles]),
        f"{row.tokens / 1e6:.1f}",
        mean(row.values("before", "perplexity"), ",.2f"),
        spread(interval(after), ",.3f") if after else "",
        over,
        mean(row.values("after", "mean_abs"), ".3f"),
        mean(row.values("after", "nonzero_share"), ".3f"),
        mean(row.values("after", "gain", "fp32"), ".2f"),
        *(mean(row.energies(name), ".2f") for name in gains),
    ]


def to_teacher(row: Row) -> list[str]:
    """The cells of ``TO_TEACHER``: empty for runs from before these were measured."""
    kl, same = (row.values("after", name) for name in ("kl", "top1_agreement"))
    return [mean(kl, ".3f"), mean([100 * share for share in same], ".1f")]


def changes(table: Table, find: Callable[[str], Row]) -> list[list[str]]:
    """What each change gave: by how much the mean perplexity is higher, and the gain before and after."""
    body = []
    for lever in table.levers:
        row, against = find(lever["row"]), find(lever["against"])
        if row.done and against.done:
            gains = (mean(r.values("after", "gain", "fp32"), ".2f") for r in (against, row))
            perplexity = spread(change(row, against), "+.2f", 100.0)
            body.append([marked(lever["change"], [row]), against.label, perplexity, " to ".join(gains)])
    return body


def checks(table: Table, rows: Sequence[Row]) -> list[list[str]]:
    """Perplexities of students as they are and so changed, on the same rows of text."""
    body = []
    for row in rows:
        for name in table.checks_of(row.row) if row.done else ():
            about = f"{name}, {DRIVEN_ROWS} rows" if name == "spike_driven" else name
            pair = (mean(row.values("checks", name, key), ".4f") for key in ("without", "perplexity"))
            body.append([row.label, about, *pair])
    return body


def origin(runs: Sequence[dict[str, Any]]) -> str:
    """Where the runs of a table come from."""
    machines = sorted({run["hardware"]["device"] for run in runs})
    dates = {run["date"][:10] for run in runs}
    when = " to ".join(sorted({min(dates), max(dates)}))
    libraries = [
        f"{name} {', '.join(found)}"
        for name in ("torch", "transformers")
        if (found := sorted({str(version) for run in runs if (version := run["versions"].get(name))}))
    ]
    minutes = sum(run["seconds"] for run in runs) / 60
    tokens = {run["held_out_tokens"] for run in runs if "held_out_tokens" in run}
    commits = sorted({commit(run["commit"]) for run in runs})
    return (
        f"{len(runs)} runs, {minutes:.1f} minutes on {', '.join(machines)}; {when}; "
        f"{'; '.join(libraries)}; {', '.join(f'{n:,}' for n in sorted(tokens))} held-out tokens; "
        f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}."
    )


def commit(name: str | None) -> str:
    """A commit in short, marked unless it has all the code."""
    if is_clean(name):
        return str(name)[:7]
    return f"unknown {MARK}" if name is None else f"{name[:7]} {MARK}"
