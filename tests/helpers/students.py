"""What tests of students of a converted model share: a small teacher, settings, a run of a few steps."""

import json
from pathlib import Path
from typing import Any

import torch

from tests.helpers.converting import FOLDER, transformer, write_prepared

ROOT = FOLDER.parents[1]
NEURON = {"class": "neurons.SILIFNode", "args": {"max_spike_count": 16}}


def prepare(convert: Any, folder: Path) -> Path:
    """A Transformer, data as prepare.py leaves them, and the Transformer's Mamba2 in 4 bits."""
    model = transformer()
    model.save_pretrained(folder / "model")
    write_prepared(folder / "data")
    dense = convert.conversion.convert(convert.llama.Llama.from_transformers(model))
    with torch.no_grad():
        for block in dense.backbone.layers:  # mixers say other things than attention does
            block.mixer.in_proj.weight.mul_(1.1)
    convert.packing.pack_mixers(dense, folder / "dense", str(folder / "model"), 4, 16)
    return folder


def settings(convert: Any, folder: Path, **changed: Any) -> Any:
    defaults = {
        "output": str(folder / "63"),
        "start": str(folder / "dense"),
        "own_text": [],
        "package_text": [str(folder / "data" / "package_text.bin")],
        "neuron": NEURON,
        "mean_abs": 1.0,
        "nonzero": 0.5,
        "rank": 4,
        "group": 16,
        "rows": 4,
        "piece": 2,
        "length": 32,
        "steps": 12,
        "log_every": 3,
        "warmup": 2,
        "compiles": False,
        "learning_rate": 5e-3,
    }
    defaults |= {"shift_inputs": changed.get("neuron", NEURON) is not None}
    return convert.student.StudentSettings(**defaults | changed)


def run(convert: Any, settings: Any) -> Any:
    Path(settings.output).mkdir(parents=True, exist_ok=True)
    stage = convert.student.StudentStage(settings)
    stage.run()
    return stage


def lines(folder: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
