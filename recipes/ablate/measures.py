"""What the students of a table are measured by: one teacher, its tokens, and held-out text."""

import copy
import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import torch
from table import DRIVEN_ROWS, Table, steps

from spiking_mamba import SpikingMambaForCausalLM, data
from spiking_mamba.common.checkpoint_files import locate
from spiking_mamba.common.errors import RunError
from spiking_mamba.common.files import file_sha256, refuse_file
from spiking_mamba.evaluation.scoring import perplexity
from spiking_mamba.model.checkpoint import load_dense
from spiking_mamba.model.conversion import spike_driven
from spiking_mamba.model.tokenizer import load_tokenizer
from spiking_mamba.spikes.counting import count_spikes
from spiking_mamba.spikes.counts import SpikeCounts
from spiking_mamba.spikes.energy import model_energy, projection_energy
from spiking_mamba.training.calibration import (
    asks_for_calibration,
    calibrate_levels,
    first_rows,
    resolve_threshold,
)
from spiking_mamba.training.distillation import DistillationSettings
from spiking_mamba.training.rows import training_text

_STUDENT = ("neuron", "membrane", "threshold", "shift_inputs")  # what one is before distillation
VERSION = 1  # of what a row measures: another number, and every row is run again


def fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def text_sha256(source: Any) -> Any:
    """The files of a source by their contents; corpora of packages, which do not change, by name."""
    if isinstance(source, list):
        return [text_sha256(each) for each in source]
    return file_sha256(Path(source)) if Path(source).is_file() else str(source)


class Measures:
    """What the rows of a table share; what several rows have in common is measured once."""

    def __init__(self, table: Table) -> None:
        self.table = table
        refuse_file(Path(table.output))
        folder = locate(table.teacher)[0]
        self.tokenizer = load_tokenizer(folder)
        self.teacher = load_dense(folder).to("cuda" if torch.cuda.is_available() else "cpu")
        files = [path for name in ("*.safetensors", "*.bin", "tokenizer.json") for path in folder.glob(name)]
        self.depends = {
            "version": VERSION,
            "teacher": {path.name: file_sha256(path) for path in sorted(files)},
            "data": text_sha256(table.data),
            "held_out": text_sha256(table.held_out),
            "held_out_rows": table.held_out_rows,
        }
        wanted = [(table.held_out, self.depends["held_out"], 512, False)]
        for row, seed in table.runs():  # what is wrong with one, or with the text, is said before the first
            settings = table.settings(row, seed)
            self._check(row["name"], settings)
            if steps(settings) or asks_for_calibration(settings.threshold):
                wanted.append((table.data, self.depends["data"], settings.length, settings.decontaminate))
        texts = self._tokenised(wanted[:2])
        if len(texts) > 1:
            self._check_batches(len(texts[1][1]) * wanted[1][2])
        held_out = self._kept(texts)[0]
        self.held_out = held_out.select(range(min(table.held_out_rows or len(held_out), len(held_out))))
        self.measured: dict[str, dict[str, Any]] = {}
        self.thresholds: dict[str, Any] = {}
        self.dense = self.measure(self.teacher)

    def training_rows(self, settings: DistillationSettings) -> datasets.Dataset:
        return self.rows(self.table.data, self.depends["data"], settings.length, settings.decontaminate)

    def _check(self, name: str, settings: DistillationSettings) -> None:
        """Raise a ValueError for what a row of this teacher would raise."""
        try:
            settings.check_student(self.teacher.config)
            if steps(settings):
                settings.make_arguments()
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: {error}") from error

    def _check_batches(self, tokens: int) -> None:
        """Raise a RunError where so many tokens are no batch of a row."""
        for row, seed in self.table.runs():
            settings = self.table.settings(row, seed)
            rows, batch = tokens // settings.length, settings.training.get("per_device_train_batch_size", 8)
            if steps(settings) and rows < batch:
                raise RunError(f"{row['name']}: data make {rows} rows, fewer than one batch of {batch}.")

    def rows(self, source: Any, sha256: Any, length: int, decontaminate: bool = False) -> datasets.Dataset:
        """Packed rows of token ids, tokenised once and kept on disk."""
        return self._kept(self._tokenised([(source, sha256, length, decontaminate)]))[0]

    def _tokenised(self, wanted: Sequence[tuple[Any, Any, int, bool]]) -> list[tuple[Path, datasets.Dataset]]:
        """Rows of texts, decontaminated or not, each with the file that it has or is to have."""
        texts = []
        for source, sha256, length, decontaminate in wanted:
            about = [sha256, self.depends["teacher"].get("tokenizer.json"), length]
            name = fingerprint(about + ["decontaminated"] * decontaminate)[:16]
            path = Path(self.table.output, "tokens", f"{name}.parquet")
            if path.is_file():
                texts.append((path, datasets.Dataset(pyarrow.parquet.read_table(path))))
            else:
                text = training_text(source, None, decontaminate)
                texts.append((path, data.tokenize(text, self.tokenizer, length)))
        return texts

    def _kept(self, texts: Sequence[tuple[Path, datasets.Dataset]]) -> list[datasets.Dataset]:
        """The same rows, read from their files."""
        for path, rows in texts:
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                draft = path.with_name(f"{path.stem}.{os.getpid()}.part")
                pyarrow.parquet.write_table(rows.data.table, draft)
                draft.replace(path)
        kept = [datasets.Dataset(pyarrow.parquet.read_table(path)) for path, _ in texts]
        return [rows.with_format("numpy") for rows in kept]  # fetched three times as fast as lists

    def measure(self, model: SpikingMambaForCausalLM) -> dict[str, Any]:
        """Held-out perplexity, spikes and energy of the very same forward passes, in float32.

        Of all but the teacher also KL to it, and how often both have the same likeliest next token.
        """
        teacher = None if model is self.teacher else self.teacher
        with count_spikes(model, histogram=False) as spikes:
            measured = perplexity(model, self.held_out, batch_size=32, progress=False, reference=teacher)
        text = {"perplexity": measured["perplexity"], "nll": measured["nll_per_token"]}
        text |= {name: measured[name] for name in ("kl", "top1_agreement") if name in measured}
        return text | self.cost(model, spikes)

    def cost(self, model: SpikingMambaForCausalLM, spikes: SpikeCounts) -> dict[str, Any]:
        if not spikes.projections:  # dense
            return {"mean_abs": None, "nonzero_share": None, "gain": {"fp32": 1.0, "fp16": 1.0, "int8": 1.0}}
        if not math.isfinite(spikes.accumulations):
            raise FloatingPointError("The spikes are not finite.")
        whole = model_energy(spikes, model.config)["model"]["fp32"]["gain"] if spikes.accumulations else None
        return {
            "mean_abs": spikes.mean_abs,
            "nonzero_share": spikes.nonzero_share,
            "gain": {k: v if math.isfinite(v) else None for k, v in projection_energy(spikes).items()},
            "gain_whole_model_fp32": whole,
        }

    def student(self, settings: DistillationSettings) -> SpikingMambaForCausalLM:
        """The student before distillation."""
        about = {name: getattr(settings, name) for name in _STUDENT}
        student = SpikingMambaForCausalLM.from_dense(self.teacher, **about).eval()
        student.rest_at(self.levels(settings))
        return student

    def levels(self, settings: DistillationSettings) -> dict[str, torch.Tensor]:
        """At which inputs rest before distillation, where they are shifted."""
        if not settings.shift_inputs:
            return {}
        return calibrate_levels(self.teacher, first_rows(self.training_rows(settings)))

    def converted(self, settings: DistillationSettings) -> dict[str, Any]:
        """What it is worth, measured once for all rows that start alike."""
        name = fingerprint([getattr(settings, name) for name in _STUDENT])
        if settings.neuron is None:
            return self.dense
        if name not in self.measured:
            self.measured[name] = self.measure(self.student(settings))
        return self.measured[name]

    def calibrated(self, settings: DistillationSettings) -> Any:
        """V_th, calibrated once for all rows that ask for the same."""
        about = {"neuron": settings.neuron, "membrane": settings.membrane}
        name = fingerprint([settings.threshold, settings.length, settings.shift_inputs, about])
        if name not in self.thresholds:
            rows, levels = self.training_rows(settings), self.levels(settings) or None
            self.thresholds[name] = resolve_threshold(
                settings.threshold, self.teacher, rows, **about, levels=levels
            )
        return self.thresholds[name]

    def check(self, name: str, model: SpikingMambaForCausalLM) -> dict[str, float]:
        """Perplexity of the changed model and, on the same rows, of the model as it is."""
        rows = self.held_out
        if name == "spike_driven":  # D products instead of one, for what must come out equal
            rows = rows.select(range(min(DRIVEN_ROWS, len(rows))))
        changes = {"bf16": with_bf16_weights, "int8": with_int8_projections, "spike_driven": spike_driven}
        models = {"perplexity": changes[name](model), "without": model}
        return {k: perplexity(m, rows, batch_size=8, progress=False)["perplexity"] for k, m in models.items()}


def with_bf16_weights(model: SpikingMambaForCausalLM) -> SpikingMambaForCausalLM:
    """A copy whose weights are rounded to bfloat16, as floats."""
    return copy.deepcopy(model).bfloat16().float()


def with_int8_projections(model: SpikingMambaForCausalLM) -> SpikingMambaForCausalLM:
    """A copy whose projections have int8 weights with a scale for each output channel, as floats.

    With counts of 2D + 1 levels in front of them, the equal-level quantised network.
    """
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for projection in rounded.projections().values():
            scale = projection.weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
            projection.weight.copy_((projection.weight / scale).round() * scale)
    return rounded
