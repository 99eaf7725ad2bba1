"""What a run found: tables for the terminal, ``report.md``, ``report.html`` and a picture."""

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from spiking_mamba.common.files import write_whole
from spiking_mamba.common.records import to_json
from spiking_mamba.reports.document import (
    Block,
    Glance,
    Heading,
    Paragraph,
    Picture,
    Quote,
    Table,
    markdown_table,
)
from spiking_mamba.reports.figures import COLOURS, Panel, short, write_png
from spiking_mamba.reports.glance import RIVAL, plural
from spiking_mamba.reports.overview import MOST, Quantity, energy_text, overview
from spiking_mamba.reports.page import write_document
from spiking_mamba.reports.spike_map import count_panels

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

__all__ = ["summary", "write_comparison", "write_report"]

_SHOWN = "What students keep and cost, KL by step, spike counts by layer"
_ENERGIES = {
    "with_neurons": "energy: projections with neurons",
    "whole_model": "energy: whole model",
    "decoding": "energy: decoding, with memory",
    "quantised_sparse": RIVAL,
}


def write_report(folder: Path, results: dict[str, Any]) -> str:
    """Write ``results.json``, ``report.md``, ``report.html`` and ``report.png`` to ``folder``.

    Returns:
        The summary.
    """
    write_whole(folder / "results.json", to_json(results))
    write_document(folder, _document(results, folder / "report.png"))
    return summary(results)


def summary(results: dict[str, Any]) -> str:
    """The tables of a distillation's results, see ``recipes/quickstart``."""
    quality, costs = (markdown_table(t.header, t.rows) for t in (_quality(results), _costs(results)))
    return f"{quality}\n\n{_closed(results)}\n\n{costs}"


def _document(results: dict[str, Any], image: Path) -> list[Block]:
    runs = {"student": results}
    first, learning, spikes = _overview(runs), _learning(runs), count_panels(results["spikes"]["projections"])
    write_png(image, [*first, learning, *spikes])
    about = (
        f"Perplexity is that of {results['held_out_tokens']} tokens of {results['held_out']}; zero-shot "
        "scores are accuracies of lm-eval's tasks with their standard errors. Energy counts operations on "
        "that text: in the projections a multiply-accumulate of the dense model against one accumulation a "
        "unit of |s|, in the neurons D accumulations a channel; compute only, unless it says otherwise. "
        "Integers are summed in 32 bits on every side."
    )
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    made = f"seed {results['seed']}; {results['seconds']:.0f} s on {results['device']}; {versions}"
    return [
        Heading("Distilling a spiking Mamba2", 1),
        Glance(_sentences(results), Picture(image, _SHOWN, first)),
        Heading("Quality"),
        _quality(results),
        Paragraph(_closed(results)),
        Heading("Costs"),
        _costs(results),
        Heading("Learning and spikes"),
        Picture(image, "KL by step, spike counts by layer", [learning, *spikes]),
        Paragraph(about),
        Paragraph(f'A sample of the student, prompted with "{results["prompt"]}":'),
        Quote(results["sample"]),
        Paragraph(f"Settings: settings.yaml; {made}."),
    ]


def _sentences(results: dict[str, Any]) -> dict[str, str]:
    """What was measured, what the student keeps of its teacher, and what it costs."""
    teacher, before, after, energy = (results[key] for key in ("teacher", "before", "after", "energy"))
    steps = plural(max((row["step"] for row in results["log"]), default=0), "step")
    text = f"{results['held_out_tokens']:,} tokens of {results['held_out']}"
    kept = [
        f"a perplexity of {after['perplexity']:.2f} against the teacher's {teacher['perplexity']:.2f} "
        f"({before['perplexity']:.2f} before distillation)",
        f"the teacher's likeliest next token in {after['top1_agreement']:.1%} of all places",
    ]
    if after["zero_shot"]:
        text += f" and {plural(len(after['zero_shot']), 'zero-shot task')}"
        kept.append(f"{_mean(after):.1%} accuracy against {_mean(teacher):.1%}, the tasks' mean")
    names = {
        "with_neurons": "projections with their neurons",
        "whole_model": "the whole model",
        "decoding": "decoding, memory traffic included,",
        "quantised_sparse": "hypothetically at int8, projections against a network that skips zeros",
    }
    costs = "; ".join(f"{name} {energy_text(energy[key])}" for key, name in names.items())
    return {
        "Measured": f"a spiking student of {results['levels']} levels, distilled from a dense Mamba2 in "
        f"{steps}, on {text}.",
        "Keeps": f"{'; '.join(kept)}.",
        "Costs": "energy against the teacher's, estimated from counted operations (at 45 nm, fp32): "
        + f"{costs}.",
    }


def _quality(results: dict[str, Any]) -> Table:
    models = ("teacher", "before", "after")
    rows = [["perplexity, held-out text", *(f"{results[m]['perplexity']:.2f}" for m in models), ""]]
    students = [results[m] for m in models[1:]]
    rows += [
        ["KL to the teacher, nats a token", "", *(f"{student['kl']:.3f}" for student in students), ""],
        ["same likeliest token as it", "", *(f"{student['top1_agreement']:.1%}" for student in students), ""],
    ]
    for task, score in results["after"]["zero_shot"].items():
        cells = [_score(results[m]["zero_shot"][task]) for m in models]
        chance = "" if score["chance"] is None else f"{score['chance']:.3f}"
        rows.append([f"{task}, {score['n']} items", *cells, chance])
    return Table(["", "teacher", "student before", "student after", "chance"], rows)


def _score(score: dict[str, Any]) -> str:
    error = score["acc_stderr"]
    return f"{score['acc']:.3f} ± " + ("?" if error is None else f"{error:.3f}")


def _closed(results: dict[str, Any]) -> str:
    return f"Distillation closed {results['gap_closed']:.0%} of the gap in nats a token."


def _costs(results: dict[str, Any]) -> Table:
    energy, spikes = results["energy"], results["spikes"]
    rows = [
        ["mean absolute spike count, by output width", f"{spikes['mean_abs']:.3f}"],
        ["share of non-zero spike counts", f"{spikes['nonzero_share']:.3f}"],
        ["energy gain of the projections with their neurons, 45 nm fp32", _times(energy["with_neurons"])],
        ["the projections alone", _times(energy["fp32"])],
        ["the whole model", _times(energy["whole_model"])],
        ["decoding at batch 1, with memory traffic", _times(energy["decoding"])],
        ["projections, int8 (hypothetical: accuracy was measured in fp32)", _times(energy["int8"])],
        [f"against a quantised network of {results['levels']} levels, int8", _times(energy["quantised"])],
        ["against the same, skipping zeros", _times(energy["quantised_sparse"])],
    ]
    if "shift_and_add" in energy:
        rows.append(["against the same integers by shift-and-add", _times(energy["shift_and_add"])])
    return Table(["spikes and energy of the student", ""], rows)


def _times(gain: float, digits: int = 2) -> str:
    return f"{gain:.{digits}f}x" if math.isfinite(gain) else "infinite"  # without a spike


def _overview(runs: Mapping[str, dict[str, Any]]) -> list[Panel]:
    """What the students keep of their teachers and what they cost."""
    quantities = []
    teachers = [results["teacher"] for results in runs.values()]
    students = [results["after"] for results in runs.values()]
    pairs = [(s["perplexity"], t["perplexity"]) for s, t in zip(students, teachers, strict=True)]
    quantities.append(_against("perplexity", pairs, "{:.2f} against {:.2f}"))
    if all(student["zero_shot"] for student in students):
        pairs = [(_mean(s), _mean(t)) for s, t in zip(students, teachers, strict=True)]
        tasks = plural(len(students[0]["zero_shot"]), "task")
        quantities.append(_against(f"mean accuracy of {tasks}", pairs, "{:.1%} against {:.1%}"))
    for key, name in _ENERGIES.items():
        gains = [results["energy"][key] for results in runs.values()]
        ratios = [1 / gain if gain else None for gain in gains]
        quantities.append(Quantity(name, ratios, [energy_text(gain) for gain in gains], cost=True))
    return overview(quantities, list(runs), "the teacher")


def _against(name: str, pairs: Sequence[tuple[float, float]], form: str) -> Quantity:
    ratios = [ours / theirs if theirs else None for ours, theirs in pairs]
    return Quantity(name, ratios, [form.format(*pair) for pair in pairs])


def _mean(model: dict[str, Any]) -> float:
    return fmean(score["acc"] for score in model["zero_shot"].values())


def _learning(runs: Mapping[str, dict[str, Any]]) -> Panel:
    return Panel(
        "KL of the student to its teacher by step of the distillation.", 2.9, partial(_draw_learning, runs)
    )


def _draw_learning(runs: Mapping[str, dict[str, Any]], figure: "FigureBase") -> None:
    panel = figure.subplots()
    for colour, (name, results) in zip(itertools.cycle(COLOURS), runs.items(), strict=False):
        points = [(row["step"], row["kl"]) for row in results["log"] if "kl" in row]
        panel.plot(
            [x for x, _ in points], [y for _, y in points], marker=".", color=colour, label=short(name, 40)
        )
    panel.set(title="KL of the student to its teacher", xlabel="step", ylabel="nats a token")
    panel.set_ylim(bottom=0)
    panel.grid()
    if len(runs) > 1:
        figure.legend(loc="outside lower left", frameon=False, fontsize=11)


def write_comparison(folder: Path, runs: Mapping[str, dict[str, Any]]) -> str:
    """Write ``report.md``, ``report.html`` and ``report.png`` of several runs side by side to ``folder``.

    Args:
        folder: is made if it is not there.
        runs: the results of each by its name.

    Returns:
        The table, for the terminal.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first = _overview(runs) if len(runs) <= MOST else []
    maps = {name: count_panels(results["spikes"]["projections"]) for name, results in runs.items()}
    learning = _learning(runs)
    image = folder / "report.png"
    write_png(image, [*first, learning, *itertools.chain(*maps.values())])
    table = _side_by_side(runs)
    blocks: list[Block] = [
        Heading("Quickstarts side by side", 1),
        Glance(
            _compared(runs),
            Picture(image, _SHOWN, first or [learning]),
        ),
        Heading("Side by side"),
        table,
        *_unlike(runs),
        Heading("Learning and spikes"),
        *([Picture(image, "KL by step", [learning])] if first else []),
    ]
    for name, panels in maps.items():
        blocks += [Heading(name, 3), Picture(image, f"Spike counts by layer: {name}", panels)]
    for name, results in runs.items():
        blocks += [Paragraph(f'{name}, prompted with "{results["prompt"]}":'), Quote(results["sample"])]
    write_document(folder, blocks)
    return markdown_table(table.header, table.rows)


def _compared(runs: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    # of different texts only the ratios can be compared
    best = min(runs, key=lambda name: runs[name]["after"]["perplexity"] / runs[name]["teacher"]["perplexity"])
    least = max(runs, key=lambda name: runs[name]["energy"]["with_neurons"])
    after, teacher = (runs[best][model]["perplexity"] for model in ("after", "teacher"))
    gain = energy_text(runs[least]["energy"]["with_neurons"])
    return {
        "Measured": f"{plural(len(runs), 'student')}, each against its own dense teacher: {', '.join(runs)}.",
        "Keeps": f"{best} is the nearest to its teacher in perplexity, {after:.2f} against {teacher:.2f}.",
        "Costs": f"{least} takes the least energy in its projections with their neurons, {gain} than its "
        "teacher, estimated from counted operations (at 45 nm, fp32).",
    }


def _unlike(runs: Mapping[str, dict[str, Any]]) -> list[Block]:
    texts = {name: f"{r['held_out_tokens']:,} tokens of {r['held_out']}" for name, r in runs.items()}
    if len(set(texts.values())) == 1:
        return []
    told = "; ".join(f"{name}: {text}" for name, text in texts.items())
    return [Paragraph(f"The perplexities are of different texts ({told}): compare each with its teacher's.")]


def _side_by_side(runs: Mapping[str, dict[str, Any]]) -> Table:
    columns = []
    for results in runs.values():
        column = {
            "levels": str(results["levels"]),
            "the teacher's perplexity": f"{results['teacher']['perplexity']:.2f}",
        }
        column |= {name: after for name, _, _, after, _ in _quality(results).rows}
        column |= {
            name.replace(f" of {results['levels']} levels", ""): cell for name, cell in _costs(results).rows
        }
        columns.append(column)
    names = dict.fromkeys(name for column in columns for name in column)
    return Table(["", *runs], [[name, *(column.get(name, "–") for column in columns)] for name in names])
