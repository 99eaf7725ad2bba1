"""Records of scores as score_student.py writes them, small, and what a page says of them."""

import json
from pathlib import Path
from typing import Any

import students_section

from tests.helpers.commands import ROOT

CONFIG = str(ROOT / "weights/smollm2-mamba2")
MAIN = {
    "hellaswag": "acc_norm", "piqa": "acc", "arc_easy": "acc", "arc_challenge": "acc_norm", "boolq": "acc",
    "winogrande": "acc",
}  # fmt: skip


def record(name: str, shift: float = 0.0, commit: str = "a" * 40, **others: Any) -> dict[str, Any]:
    tasks = {
        task: {"acc": 0.5 + shift, "acc_norm": 0.5 + shift} | {metric: 0.4 + shift + 0.01 * number}
        for number, (task, metric) in enumerate(MAIN.items())
    }
    about = {"commit": commit, "date": "2026-12-01T10:00:00+00:00", "hardware": {"device": "one H200"}}
    base = {"name": name, "model": CONFIG, "tasks": tasks, "perplexity_web": 40.0, "provenance": about}
    return base | others


def spiking(name: str, mean_abs: float, nonzero: float, **others: Any) -> dict[str, Any]:
    both = {"mean_abs": mean_abs, "nonzero": nonzero, "tokens": 10}
    return record(
        name,
        -0.02,
        neuron={"class": "neurons.SILIFNode", "args": {"max_spike_count": 127}},
        spikes={"text": both, "first": both, "both": both},
        kept={"share": 0.93, "low": 0.91, "high": 0.95},
        gap={"gap": 2.0, "low": 1.5, "high": 2.5},
        teacher_kl_web=0.1,
        teacher_agreement_web=0.8,
        progress={"tokens": 22_000_000},
        **others,
    )


def about_records(folder: Path) -> students_section.About:
    """A dense model, a student and a rival, scored, and one that was not."""
    records = [
        record("teacher"),
        spiking("s63", 1.05, 0.62),
        record("w8a8", -0.001, commit="b" * 40 + "-dirty", weights=8, activations=8),
    ]
    path = folder / "students.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return students_section.About(
        title="Students",
        text="Of a teacher.",
        records=str(path),
        config=CONFIG,
        labels={"teacher": "dense", "s63": "student, 63%", "s40": "student, 40%", "w8a8": "int8"},
        findings=["Kept {s63.kept:.1f} % at {s63.nonzero:.2f}.", "Left out: {s40.kept:.1f} %."],
    )
