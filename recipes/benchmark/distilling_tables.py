"""What ``distilling.py`` has recorded, as tables, and as records of docs/results/speeds.jsonl."""

from pathlib import Path
from typing import Any

from distilling_parts import WHOLE

from spiking_mamba.common.records import put_record
from spiking_mamba.reports.document import markdown_table

__all__ = ["agreement", "rate", "report", "tables"]

EVERY = 10  # steps that the recipe logs once
RECIPE_TOKENS = 20_000 * 8 * 8 * 2048  # steps, GPUs, rows, tokens of a row: mamba2-1.3b.yaml's
TITLE = "{} GPUs#{}"
NUMBERS = {2: "Two", 4: "Four", 8: "Eight"}
Record = dict[str, Any]
Table = tuple[list[str], list[list[str]]]


def rate(record: Record) -> float:
    """Tokens a second of all GPUs, one step in ten being logged; of plain steps where none was timed."""
    plain = record["step_seconds"]
    logged = record.get("logged_step_seconds", plain)
    return record["tokens"] * EVERY / ((EVERY - 1) * plain + logged)


def _alone(record: Record, records: dict[str, Record]) -> Record | None:
    """The record of one GPU with the same model and batch."""
    same = ("size", "rows", "accumulated", "checkpointing")
    single = [r for r in records.values() if r["settings"]["gpus"] == 1 and "step_seconds" in r]
    return next((r for r in single if all(r["settings"][k] == record["settings"][k] for k in same)), None)


def _broken(settings: Record) -> bool:
    """Whether that is a run that is killed, or resumed."""
    return bool(settings["kill_at"] or settings["resumes"])


def _kind(settings: Record) -> str:
    sharding = {"alone": "one GPU", "ddp": "DDP", "fsdp2": "FSDP2"}[settings["sharding"]]
    gpus = "" if settings["gpus"] == 1 else f" on {settings['gpus']}"
    batch = f"{settings['accumulated']} x {settings['rows']} rows"
    kept = "" if settings["checkpointing"] else ", activations kept"
    return f"{settings['size'].upper()}, {sharding}{gpus}, {batch}{kept}"


def speeds(records: dict[str, Record]) -> Table:
    header = ["distilling", "tokens/s", "over one GPU", "ms a step", "ms a logged step", "peak GiB a GPU"]
    rows = []
    for record in records.values():
        if "step_seconds" not in record or _broken(record["settings"]):
            continue
        alone = _alone(record, records)
        over = "-" if alone is None else f"{rate(record) / rate(alone):.2f}"
        logged = record.get("logged_step_seconds")
        cells = [f"{rate(record):.0f}", over, f"{1e3 * record['step_seconds']:.0f}"]
        cells += ["-" if logged is None else f"{1e3 * logged:.0f}"]
        cells += [f"{record['peak_allocated_gib']:.1f}" if "peak_allocated_gib" in record else "-"]
        rows.append([_kind(record["settings"]), *cells])
    return header, rows


def agreement(records: dict[str, Record]) -> dict[str, float] | None:
    """The losses of the resumed run beside those of the one left alone: the largest relative difference."""
    whole, resumed = records.get(WHOLE), records.get("resumed")
    if whole is None or resumed is None or not resumed.get("log"):
        return None
    kept = {row["step"]: row for row in whole["log"]}
    pairs = [(row, kept[row["step"]]) for row in resumed["log"] if row["step"] in kept]
    if not pairs:
        return None
    differences = {"from": resumed["settings"]["save_at"], "to": pairs[-1][0]["step"]}
    for name in ("loss", "kl", "spike_size", "grad_norm"):
        both = [(a[name], b[name]) for a, b in pairs if name in a and name in b]
        if both:
            differences[name] = max(abs(a - b) / max(abs(b), 1e-12) for a, b in both)
    return differences


def resumption(records: dict[str, Record]) -> Table | None:
    differences = agreement(records)
    if differences is None:
        return None
    header = ["killed and resumed", "largest relative difference, thousandths"]
    names = {"loss": "loss", "kl": "KL", "spike_size": "spike size", "grad_norm": "norm of the gradient"}
    return header, [
        [title, f"{1e3 * differences[name]:.3f}"] for name, title in names.items() if name in differences
    ]


def profiles(records: dict[str, Record]) -> Table | None:
    """What a GPU did in a step, per cent of it."""
    profiled = [r for r in records.values() if "profile" in r and r["profile"]["kernels"]]
    if not profiled:
        return None
    header = ["share of a step, %", *(_kind(r["settings"]) for r in profiled)]
    states = {
        "computing": "computing",
        "communication alone": "exposed_communication",
        "communication behind computing": "hidden_communication",
        "idle": "idle",
    }
    rows = [[title, *(f"{100 * r['profile'][key]:.1f}" for r in profiled)] for title, key in states.items()]
    kinds = list(dict.fromkeys(kind for r in profiled for kind in r["profile"]["kinds"]))
    for kind in kinds:
        rows.append(
            [f"kernels: {kind}", *(f"{100 * r['profile']['kinds'].get(kind, 0):.1f}" for r in profiled)]
        )
    rows.append(["kernels a step", *(str(r["profile"]["kernels"]) for r in profiled)])
    return header, rows


def cost(records: dict[str, Record]) -> Table:
    """What the recipe's tokens would take on all the GPUs, were there no checkpoints."""
    gpus = max((r["settings"]["gpus"] for r in records.values()), default=0)
    header = [f"{RECIPE_TOKENS / 1e9:.2f} billion tokens", "hours", "GPU-hours"]
    rows = []
    for record in records.values():
        settings = record["settings"]
        if "step_seconds" in record and settings["gpus"] == gpus and not _broken(settings):
            hours = RECIPE_TOKENS / rate(record) / 3600
            rows.append([_kind(settings), f"{hours:.2f}", f"{gpus * hours:.1f}"])
    return header, rows


def tables(records: list[Record]) -> dict[int, Table]:
    """By the numbers that they have among the records."""
    named = {record["part"]: record for record in records}
    numbered = {1: speeds(named), 2: cost(named), 3: profiles(named), 4: resumption(named)}
    return {number: table for number, table in numbered.items() if table is not None and table[1]}


def report(records: list[Record], file: Path | None = None) -> str:
    """The tables, and what did not come about; with a file, the tables are put into it, too."""
    gpus = max((r["settings"]["gpus"] for r in records), default=0)
    made = tables(records)
    for number, (header, rows) in made.items():
        if file is not None:
            record = {"table": TITLE.format(NUMBERS.get(gpus, gpus), number)}
            record["command"] = f"python recipes/benchmark/distilling.py --gpus {gpus}"
            record["record"] = "docs/results/distilling.jsonl"
            put_record(file, record | {"header": header, "rows": rows}, ("table",))
    texts = [markdown_table(*table) for table in made.values()]
    others = [f"{r['part']}: {r['state']}" for r in records if r["state"] not in ("done", "killed")]
    starts = [
        f"{r['part']}: {r['start_seconds']} s before the first step, {r['seconds'].get('1', '?')} s in it"
        + (f", checkpoint in {r['saved_seconds']} s" if "saved_seconds" in r else "")
        for r in records
        if "start_seconds" in r and "seconds" in r
    ]
    return "\n\n".join([*texts, "\n".join(starts), *(["\n".join(others)] if others else [])])
