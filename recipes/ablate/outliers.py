"""What a model loses with its largest activations.

python recipes/ablate/outliers.py recipes/ablate/outliers.yaml
"""

import itertools
import json
import math
import time
from dataclasses import field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from transformers import PreTrainedTokenizerBase

from spiking_mamba import SpikingMambaForCausalLM, data, evaluation
from spiking_mamba.common.checkpoint_files import locate
from spiking_mamba.common.errors import RunError, fail_clearly
from spiking_mamba.common.files import write_whole
from spiking_mamba.common.interruption import interruptible
from spiking_mamba.common.machine import device_name
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.provenance import provenance
from spiking_mamba.common.schema import Count, Fraction, Name, Names, Natural, Seed, Words, schema
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.evaluation.outliers import SCOPES, number_of_outliers, replace_outliers, width_of
from spiking_mamba.model.checkpoint import load_model
from spiking_mamba.model.configuration import BLOCK_TYPES, PROJECTIONS
from spiking_mamba.model.tokenizer import check_vocabulary, load_tokenizer
from spiking_mamba.reports.document import markdown_table
from spiking_mamba.reports.figures import COLOURS, picture
from spiking_mamba.training.run import start_run
from spiking_mamba.training.student import Length

VERSIONS = ("torch", "transformers", "spikingjelly")
NAMES = {"in_proj": "u (input of in_proj)", "out_proj": "y (input of out_proj)"}


def _several(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else [value]


NUMBERS = Words("a number or a list of numbers")
Value = Annotated[float, Field(ge=-1e9, le=1e9)]


@schema
class OutlierSettings:
    """Settings of the study; every field is a key of the YAML file.

    Attributes:
        output: folder of the run: ``report.md``, ``perplexity.png`` and ``results.json``.
        model: folder or hub name of a Mamba2 checkpoint, dense (transformers', state-spaces', ours) or
            spiking.
        tokenizer: folder or hub name; null: the checkpoint's own.
        sites: whose inputs are changed: in_proj (the source's u), out_proj (its y).
        block: in blocks of which kind, mamba or mlp.
        first: places at the start of every row that stay as they are, such as an attention sink.
        values: what the largest activations become.
        fractions: how many of them, as shares of 1. A run without any, the control, is always made.
        per: 'token': of the channels of every token; 'tensor': of a whole batch, which depends on batch_size.
        data: sources of text, see ``spiking_mamba.data.load_text``; each has its own perplexity, on its
            held-out documents.
        length: tokens a row.
        rows: how many of each source, at most.
        batch_size: rows at a time.
        tasks: zero-shot sets, see ``spiking_mamba.data.benchmarks.CHANCE``; may be empty.
        limit: items of each set; null for all.
        limit_seed: which ones those are.
        resume, overwrite: go on with, or throw away, the run in ``output``.
    """

    output: Name
    model: Name
    tokenizer: Name | None = None
    sites: Annotated[list[Literal[PROJECTIONS]], BeforeValidator(_several), Field(min_length=1)] = field(
        default_factory=lambda: list(PROJECTIONS)
    )
    block: Literal[BLOCK_TYPES] = "mamba"
    first: Natural = 0
    values: Annotated[list[Value], BeforeValidator(_several), Field(min_length=1), NUMBERS] = field(
        default_factory=lambda: [0.0, 1.0]
    )
    fractions: Annotated[list[Fraction], BeforeValidator(_several), NUMBERS] = field(
        default_factory=lambda: [0.0001, 0.001, 0.01]
    )
    per: Literal[SCOPES] = "token"
    data: Annotated[Names, Field(min_length=1)] = field(
        default_factory=lambda: ["wikipedia-leads", "state-of-the-union"]
    )
    length: Length = 256
    rows: Count = 200
    batch_size: Count = 8
    tasks: Names = field(default_factory=list)
    limit: Count | None = None
    limit_seed: Seed = 0
    resume: bool = False
    overwrite: bool = False


def conditions(settings: OutlierSettings) -> list[dict[str, Any]]:
    """The control, then each site with each value and fraction: the table's rows, without results."""
    fractions = sorted({float(fraction) for fraction in settings.fractions} - {0.0})
    values = dict.fromkeys(map(float, settings.values))
    rows = [{"site": None, "value": None, "fraction": 0.0}]
    for site, value, fraction in itertools.product(dict.fromkeys(settings.sites), values, fractions):
        rows.append({"site": site, "value": value, "fraction": fraction})
    return rows


def title(row: dict[str, Any]) -> str:
    if row["site"] is None:
        return "control"
    return f"{row['site']} = {row['value']:g}, {100 * row['fraction']:g} %"


def load_rows(settings: OutlierSettings, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Held-out rows of token ids of every source."""
    texts = {}
    for source in map(str, settings.data):
        text = data.load_text(source, split="held_out")
        rows = data.tokenize(text, tokenizer, settings.length).shuffle(seed=0)
        texts[source] = rows.select(range(min(settings.rows, len(rows))))
    return texts


def measure(
    model: SpikingMambaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: dict[str, Any],
    tasks: Any,
    settings: OutlierSettings,
) -> dict[str, Any]:
    measures: dict[str, Any] = {
        "perplexity": {
            name: evaluation.perplexity(model, rows, settings.batch_size) for name, rows in texts.items()
        }
    }
    measures["zero_shot"] = (
        evaluation.zero_shot(
            model, tokenizer, tasks, settings.limit, settings.batch_size, seed=settings.limit_seed
        )
        if tasks
        else {}
    )
    return measures


def run(settings: OutlierSettings) -> dict[str, Any]:
    """Measure every condition that ``results.json`` does not hold yet; return what it then holds."""
    checkpoint = locate(settings.model)[0]
    model = load_model(checkpoint).to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(checkpoint, settings.tokenizer)
    check_vocabulary(tokenizer, model)
    texts = load_rows(settings, tokenizer)
    tasks = evaluation.zero_shot_tasks(settings.tasks) if settings.tasks else None
    folder = start_run(settings, settings.resume, settings.overwrite)
    path = folder / "results.json"
    weights = evaluation.weights_sha256(checkpoint)
    results: dict[str, Any] = {"rows": _rows_done(path, weights)}
    results |= {
        "model": settings.model,
        "weights_sha256": weights,
        "per": settings.per,
        "block": settings.block,
        "first": settings.first,
        "device": device_name(),
        "versions": {name: version(name) for name in VERSIONS},
        "provenance": provenance(settings),
    }
    if not model.config.number_of_blocks(settings.block):
        raise RunError(f"block={settings.block}: {settings.model} has no such block.")
    widths = {name: width_of(model, name, settings.block) for name in PROJECTIONS}
    todo = conditions(settings)
    keeps = f"rows are kept in {folder}; resume=true goes on."
    with interruptible(lambda: f"{len(results['rows'])} of {len(todo)} {keeps}"):
        for number, condition in enumerate(todo, 1):
            site = condition["site"]
            row = dict(condition)
            if site is not None and settings.per == "token":
                row["channels"] = [number_of_outliers(condition["fraction"], widths[site]), widths[site]]
            if any(all(old[key] == condition[key] for key in condition) for old in results["rows"]):
                continue
            print(f"{number}/{len(todo)}  {title(row)}", flush=True)
            if (same := _same_change(row, results["rows"])) is not None:
                row |= {key: same[key] for key in ("perplexity", "zero_shot")} | {"seconds": 0.0}
            else:
                start = time.time()
                change = site or PROJECTIONS[0], row["value"] or 0.0, row["fraction"]
                with replace_outliers(model, *change, settings.per, settings.block, settings.first):
                    try:
                        row |= measure(model, tokenizer, texts, tasks, settings)
                    except FloatingPointError as error:
                        raise RunError(f"{title(row)}: {error} Finished rows are kept.") from error
                row["seconds"] = time.time() - start
            results["rows"].append(row)
            write_whole(path, json.dumps(results, indent=1))  # a row that is here is never measured again
        report(folder, results, settings)
    return results


def _rows_done(path: Path, weights: str) -> list[dict[str, Any]]:
    """The rows of an interrupted run, which must be of the same weights: they are compared to each other."""
    if not path.is_file():
        return []
    try:
        before = json.loads(path.read_text())
        rows, same = before["rows"], before["weights_sha256"] == weights
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{path} is damaged: say overwrite=true to begin anew.") from None
    if not same:
        raise RunError(f"{path} is about other weights of the model: say overwrite=true to begin anew.")
    return rows


def _same_change(row: dict[str, Any], done: list[dict[str, Any]]) -> dict[str, Any] | None:
    """A row in which as many channels were overwritten with the same: 0.01 % and 0.1 % of 768 are both 1."""
    keys = ("site", "value", "channels")
    return next((old for old in done if "channels" in row and all(old.get(k) == row[k] for k in keys)), None)


def table(results: dict[str, Any]) -> str:
    control = results["rows"][0]
    texts, tasks = list(control["perplexity"]), control["zero_shot"]
    metrics = [(t, m) for t, scores in tasks.items() for m in ("acc", "acc_norm") if scores[m] is not None]
    header = ["activations", "become", "largest", "channels a token"]
    header += [f"perplexity, {text}" for text in texts] + [f"{task}, {metric} %" for task, metric in metrics]
    lines = []
    for row in results["rows"]:
        named = row["site"] is not None
        line = [NAMES[row["site"]] if named else "unchanged (control)", f"{row['value']:g}" if named else ""]
        line.append(f"{100 * row['fraction']:g} %" if named else "")
        line.append("{} of {}".format(*row["channels"]) if "channels" in row else "")
        for text in texts:
            value, base = (r["perplexity"][text]["perplexity"] for r in (row, control))
            line.append(f"{value:,.2f}" + (f" ({value / base:,.3g}x)" if named else ""))
        for task, metric in metrics:
            value, error = row["zero_shot"][task][metric], row["zero_shot"][task][f"{metric}_stderr"]
            line.append(f"{100 * value:.2f}" + ("" if error is None else f" ± {100 * error:.2f}"))
        lines.append(line)
    return markdown_table(header, lines)


def draw(path: Path, results: dict[str, Any]) -> None:
    """Perplexity over the control's, by fraction and value: a row a text, a column a site."""
    from matplotlib.ticker import LogLocator

    control, *rows = map(dict, results["rows"])
    texts = list(control["perplexity"])
    sites, values, fractions = (
        list(dict.fromkeys(r[k] for r in rows)) for k in ("site", "value", "fraction")
    )
    bases = {text: control["perplexity"][text]["perplexity"] for text in texts}
    for row in rows:  # a perplexity that overflowed has no bar; the table says inf
        row["ratio"] = {t: row["perplexity"][t]["perplexity"] / bases[t] for t in texts}
    known = [ratio for row in rows for ratio in row["ratio"].values() if math.isfinite(ratio)]
    logarithmic = max(known, default=1.0) > 5
    grid = {"nrows": len(texts), "ncols": len(sites), "sharey": "row", "sharex": True, "squeeze": False}
    with picture(path, 1.5 + 4 * len(sites), 0.8 + 2.6 * len(texts), **grid) as (figure, axes):
        for (line, text), (column, site) in itertools.product(enumerate(texts), enumerate(sites)):
            panel = axes[line, column]
            for index, value in enumerate(values):
                chosen = [row for row in rows if row["site"] == site and row["value"] == value]
                chosen = [row for row in chosen if math.isfinite(row["ratio"][text])]
                ratios = [row["ratio"][text] for row in chosen]
                width = 0.8 / len(values)
                x = [fractions.index(row["fraction"]) - 0.4 + (index + 0.5) * width for row in chosen]
                color = COLOURS[index % len(COLOURS)]
                bars = panel.bar(
                    x, [r - 1 for r in ratios], width, bottom=1, color=color, label=f"set to {value:g}"
                )
                panel.bar_label(bars, [f"{ratio:.3g}x" for ratio in ratios], padding=2, fontsize=8)
            if logarithmic:
                panel.set_yscale("log")
                panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                panel.yaxis.set_minor_formatter("")
            panel.yaxis.set_major_formatter("{x:g}x")
            panel.axhline(1.0, color="black", linewidth=0.8)
            panel.margins(y=0.15)
            panel.set_xticks(range(len(fractions)), [f"{100 * fraction:g} %" for fraction in fractions])
            panel.set_title(f"{NAMES[site]}\n{text}", fontsize=10)
        for panel in axes[:, 0]:
            panel.set_ylabel("perplexity over\nthe control's")
        for panel in axes[-1]:
            panel.set_xlabel("largest activations overwritten")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=4, frameon=False)


def report(folder: Path, results: dict[str, Any], settings: OutlierSettings) -> None:
    lines = ["# What the largest activations are worth", f"`{settings.model}`", table(results)]
    if len(results["rows"]) > 1:
        draw(folder / "perplexity.png", results)
        lines.append("![Perplexity over the control's by share of activations overwritten](perplexity.png)")
    scope = (
        "in every token the channels of largest magnitude"
        if settings.per == "token"
        else f"in every batch of {settings.batch_size} the entries of largest magnitude"
    )
    kept = f", but for each row's first {settings.first}" if settings.first else ""
    tokens = [f"{r['tokens']:,} of {name}" for name, r in results["rows"][0]["perplexity"].items()]
    lines.append(
        f"In every {settings.block} block, {scope}, rounded up, become the value given{kept}. "
        f"Held-out tokens: {', '.join(tokens)}. "
        f"{results['device']}; {', '.join(f'{name} {v}' for name, v in results['versions'].items())}."
    )
    write_whole(folder / "report.md", "\n\n".join(lines) + "\n")
    print(f"\n{table(results)}\n\nReport: {folder / 'report.md'}")


@fail_clearly()
def main() -> None:
    settings = parse_settings(OutlierSettings, description=__doc__)
    quiet()
    run(settings)


if __name__ == "__main__":
    main()
