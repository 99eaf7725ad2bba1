"""Preference optimisation of a spiking or dense model: DPO and KTO, by trl's trainers."""

import os
import time
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import datasets
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

from spiking_mamba.common.errors import RunError
from spiking_mamba.common.files import write_whole
from spiking_mamba.common.interruption import interruptible
from spiking_mamba.common.progress import Stage
from spiking_mamba.common.provenance import provenance
from spiking_mamba.common.records import to_json
from spiking_mamba.common.schema import (
    Auto,
    Count,
    Name,
    Seed,
    Source,
    Sources,
    Words,
    schema,
)
from spiking_mamba.data.preference_rows import same_rows
from spiking_mamba.data.preferences import Preference, RowReport, read_preferences
from spiking_mamba.data.text import draw_rows
from spiking_mamba.evaluation.preferences import compare, evaluate_preferences
from spiking_mamba.model.checkpoint import load_model
from spiking_mamba.model.configuration import SpikingMambaConfig
from spiking_mamba.model.modeling import SpikingMambaForCausalLM
from spiking_mamba.model.tokenizer import check_vocabulary, load_tokenizer
from spiking_mamba.training.arguments import Training, compile_blocks, training_arguments
from spiking_mamba.training.objective import check_objective
from spiking_mamba.training.preference_trainer import (
    METHODS,
    SpikingDPOTrainer,
    SpikingKTOTrainer,
    check_batch_size,
)
from spiking_mamba.training.run import finish_run, kept_in, run, run_folder, whole_model
from spiking_mamba.training.student import Compensation, Length, check_student

__all__ = [
    "METHODS",
    "PreferenceSettings",
    "SpikingDPOTrainer",
    "SpikingKTOTrainer",
    "optimise",
    "pair_rows",
]


def pair_rows(preferences: Sequence[Preference], method: str, seed: int = 0) -> datasets.Dataset:
    """Rows for the trainer of ``method``: 'dpo' needs pairs; for 'kto' each pair makes two rows, shuffled.

    Raises:
        RunError: there is no pair.
    """
    labelled = preferences[0].label is not None
    if method == "dpo":
        if labelled:
            raise RunError("DPO needs pairs: rows with chosen and rejected. For labelled ones there is KTO.")
        return datasets.Dataset.from_dict(
            {
                "prompt_ids": [p.prompt for p in preferences],
                "chosen_ids": [p.completions[0] for p in preferences],
                "rejected_ids": [p.completions[1] for p in preferences],
            }
        )
    rows = [
        {"prompt_ids": p.prompt, "completion_ids": completion, "label": label}
        for p in preferences
        for completion, label in zip(p.completions, (p.label,) if labelled else (True, False), strict=True)
    ]
    return datasets.Dataset.from_list(rows).shuffle(seed=seed).flatten_indices()


@schema
class PreferenceSettings:
    """Settings of one preference optimisation; every field is a key of the YAML file.

    Attributes:
        model: folder or hub name of the checkpoint to start from, spiking or dense, in any form.
        output: folder of the run: settings, checkpoints, log, ``results.json``, the model in ``model/``.
        method: dpo or kto.
        data: pairs or labelled completions, see ``spiking_mamba.data.preferences.load_preferences``.
        split: of ``data``, to train on.
        decontaminate: leave out rows of a file or of the hub that share 13 words in a row with what is
            evaluated, see ``spiking_mamba.data.contamination``; their number is printed.
        limit: how many of its rows to take at most, drawn by ``seed``; null for all.
        held_out: source of the pairs that the preference accuracy is measured on; null for none.
        held_out_split: of ``held_out``.
        held_out_items: questions of each task in it, with all their pairs, the same for every seed; null for
            all.
        held_out_half: 'tune' or 'report', the half of the held-out questions to measure on: what is chosen by
            the one is reported on the other; null for all.
        half_seed: of the division.
        length: tokens of prompt and completion together.
        end_of_text: let completions that are no conversations end with the end-of-text token.
        bad_rows: 'skip' or 'refuse', see ``spiking_mamba.data.preferences.BAD_ROWS``.
        tokenizer: folder or hub name, for checkpoints without one of their own.
        reference: 'copy' or 'precomputed', see ``SpikingDPOTrainer``.
        sgc: Smoothed Gradient Compensation, see ``SpikingMambaConfig``; null for none.
        freeze_embeddings: keep the embeddings.
        objective: fields of trl's ``DPOConfig`` or ``KTOConfig``: ``beta``, ``loss_type`` ...
        training: fields of transformers' ``TrainingArguments``; ``bf16: auto`` where it pays.
        text: text for the perplexity that nothing was trained on, see ``spiking_mamba.data.load_text``; null
            for none.
        text_rows, text_length: how many rows of it, of how many tokens.
        compile: run the blocks through ``torch.compile``, every new length for a minute: true, false or auto.
        seed: of data order and every random generator.
        resume: go on with the run in ``output``.
        overwrite: throw away the run in ``output``.
    """

    model: Source
    output: Name
    method: Literal["dpo", "kto"]
    data: Name = "answer_preference"
    split: Name = "train"
    decontaminate: bool = True
    limit: Count | None = None
    held_out: Name | None = "answer_preference"
    held_out_split: Name = "validation"
    held_out_items: Count | None = 500
    held_out_half: Literal["tune", "report"] | None = None
    half_seed: Seed = 0
    length: Length = 128
    end_of_text: bool = True
    bad_rows: Literal["skip", "refuse"] = "skip"
    tokenizer: Name | None = None
    reference: Literal["copy", "precomputed"] = "copy"
    sgc: Compensation | None = None
    freeze_embeddings: bool = True
    objective: Annotated[dict[str, Any], Words("a mapping, fields of trl's DPOConfig or KTOConfig")] = field(
        default_factory=dict
    )
    training: Training = field(default_factory=dict)
    text: Sources | None = "wikipedia-passages"
    text_rows: Count = 200
    text_length: Length = 256
    compile: Auto = False
    seed: Seed = 0
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_objective(self.method, METHODS[self.method].config, self.objective)
        if self.held_out is not None and same_rows(self.data, self.split, self.held_out, self.held_out_split):
            raise ValueError(f"held_out must not be what is trained on, got {self.held_out} for both.")
        if self.sgc is not None:
            check_student({"class": "neurons.SILIFNode"}, self.sgc, "token", 1.0, False, False)

    def read(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Preference], RowReport]:
        """The rows to train on."""
        how = {"limit": self.limit, "seed": self.seed, "decontaminate": self.decontaminate}
        return self._read(self.data, self.split, tokenizer, **how)

    def read_held_out(
        self, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[list[Preference] | None, RowReport | None]:
        """The pairs that the accuracy is measured on; None without."""
        if self.held_out is None:
            return None, None
        split, limit = self.held_out_split, self.held_out_items
        half = {"half": self.held_out_half, "half_seed": self.half_seed}
        preferences, report = self._read(self.held_out, split, tokenizer, limit=limit, per_task=True, **half)
        if preferences[0].label is not None:
            raise RunError(f"held_out: {self.held_out} must hold pairs: rows with chosen and rejected.")
        return preferences, report

    def _read(
        self, source: str, split: str, tokenizer: PreTrainedTokenizerBase, **options: Any
    ) -> tuple[list[Preference], RowReport]:
        options |= {"end_of_text": self.end_of_text, "bad_rows": self.bad_rows}
        return read_preferences(source, split, tokenizer, self.length, **options)

    def make_arguments(self) -> TrainingArguments:
        training = {"gradient_checkpointing": False} | self.training  # trl's default is true
        made = training_arguments(
            Path(self.output),
            training,
            self.seed,
            METHODS[self.method].config,
            max_length=self.length,
            **self.objective,
        )
        check_batch_size(made)
        return made


def _with_sgc(model: SpikingMambaForCausalLM, sgc: dict | None) -> SpikingMambaForCausalLM:
    """The model with the SGC path that the settings ask for; checkpoints have none."""
    if sgc is None:
        return model
    if model.config.neuron is None:
        raise ValueError("A dense model has no use for sgc: leave it null.")
    config = SpikingMambaConfig.from_dict(model.config.to_dict() | {"sgc": sgc})
    trained = SpikingMambaForCausalLM(config).eval()
    trained.load_state_dict(model.state_dict())
    trained.generation_config = model.generation_config
    return trained


def optimise(settings: PreferenceSettings) -> dict[str, Any] | None:
    """Train a model on preferences as the settings say, and measure it before and after.

    Returns:
        What ``results.json`` holds, on the first process: see :func:`evaluate_preferences` and
        :func:`compare`; ``rows`` and ``held_out`` say what became of the data.

    Raises:
        RunError, CheckpointError, DataError, ValueError: before anything is written or trained.
    """
    start = time.time()
    set_seed(settings.seed)
    arguments = settings.make_arguments()
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise RunError("Preference optimisation divides no models: launch it with recipes/distill/ddp.yaml.")
    model = _with_sgc(load_model(settings.model), settings.sgc)
    tokenizer = load_tokenizer(settings.model, settings.tokenizer)
    check_vocabulary(tokenizer, model)
    preferences, report = settings.read(tokenizer)
    rows = pair_rows(preferences, settings.method, settings.seed)
    if len(rows) < (batch := arguments.train_batch_size * arguments.world_size):
        raise RunError(
            f"The data make {len(rows)} rows, fewer than one batch of {batch} "
            f"(training.per_device_train_batch_size on every process): {report}."
        )
    held_out, held_out_report = settings.read_held_out(tokenizer)
    text = settings.text and draw_rows(settings.text, tokenizer, settings.text_length, settings.text_rows)
    compile_blocks(settings.compile, model)
    with (
        interruptible(lambda: kept_in(Path(settings.output))),
        run_folder(settings, settings.resume, settings.overwrite) as folder,
    ):
        main = PartialState().is_main_process
        if main:
            _tell(settings, report, held_out_report)
        if settings.reference == "precomputed":
            rows = _on_disk(rows, folder / "rows")
        trainer = METHODS[settings.method].trainer(
            model,
            reference=settings.reference,
            freeze_embeddings=settings.freeze_embeddings,
            args=arguments,
            train_dataset=rows,
            processing_class=tokenizer,
        )
        history = run(trainer, settings.resume)
        trained = finish_run(whole_model(trainer), tokenizer, folder)
        if not main:
            return None
        seconds = time.time() - start
        del trainer, model  # room for the two to be measured
        results = {
            **_described(settings, trained, report, held_out_report),
            **_measured(settings.model, trained, held_out, text, arguments),
            "log": history,
            "seconds": {"training": seconds, "all": time.time() - start},
            "provenance": provenance(settings),
        }
        write_whole(folder / "results.json", to_json(results))
    return results


def _tell(settings: PreferenceSettings, report: RowReport, held_out: RowReport | None) -> None:
    print(f"{settings.data}: {report}.")
    if held_out is not None:
        half = f", its half to {settings.held_out_half}" if settings.held_out_half else ""
        print(f"Held out, {settings.held_out}{half}: {held_out}.")


def _described(
    settings: PreferenceSettings, trained: Path, report: RowReport, held_out: RowReport | None
) -> dict[str, Any]:
    """What was trained, and on what."""
    half = {"half": settings.held_out_half, "half_seed": settings.half_seed}
    return {
        "method": settings.method,
        "model": str(trained),
        "rows": report.to_dict(),
        "held_out": None if held_out is None else held_out.to_dict() | half,
    }


def _measured(
    before: str,
    after: Path,
    held_out: list[Preference] | None,
    text: datasets.Dataset | None,
    arguments: TrainingArguments,
) -> dict[str, Any]:
    """What the two models are worth, and what changed between them."""
    results: dict[str, Any] = {}
    with Stage(2 * ((held_out is not None) + (text is not None)), "evaluating") as stage:
        for stage.label, name in (("before", before), ("after", after)):
            # one model at a time: no variable of it
            results[stage.label] = evaluate_preferences(
                load_model(name).to(arguments.device),
                held_out,
                text,
                arguments.per_device_eval_batch_size,
                stage,
            )
    return results | {"change": compare(results["before"], results["after"])}


def _on_disk(rows: datasets.Dataset, folder: Path) -> datasets.Dataset:
    """The same rows from a file.

    Beside it trl keeps the reference's log-probabilities, for all processes to find, and for a resumed run.
    """
    with PartialState().main_process_first():
        if not folder.exists():
            draft = folder.with_name(folder.name + ".part")
            rows.save_to_disk(str(draft))
            draft.replace(folder)
    return datasets.load_from_disk(str(folder))
