"""One-stage distillation of a dense Mamba2 into a spiking one."""

from collections.abc import Sequence
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from spiking_mamba import data
from spiking_mamba.common.interruption import interruptible
from spiking_mamba.common.schema import Auto, Keys, Name, Seed, Source, Sources, Words, schema
from spiking_mamba.model.checkpoint import load_dense
from spiking_mamba.model.configuration import SpikingMambaConfig
from spiking_mamba.model.modeling import SpikingMambaForCausalLM
from spiking_mamba.model.tokenizer import load_tokenizer
from spiking_mamba.spikes.counting import count_spikes
from spiking_mamba.training.arguments import Training, autocast, compile_blocks, training_arguments
from spiking_mamba.training.calibration import (
    asks_for_calibration,
    calibrate_levels,
    first_rows,
    resolve_threshold,
)
from spiking_mamba.training.distillation_loss import DistillationLoss
from spiking_mamba.training.rows import check_rows, collate, training_text
from spiking_mamba.training.run import finish_run, kept_in, run, run_folder, whole_model
from spiking_mamba.training.student import (
    Compensation,
    Length,
    Membrane,
    Neuron,
    Threshold,
    check_student,
)
from spiking_mamba.training.trainer import SpikingTrainer, sgc_lambda

__all__ = ["DistillationSettings", "DistillationTrainer", "distill", "first_threshold", "sgc_lambda"]


class DistillationTrainer(SpikingTrainer):
    """transformers' ``Trainer`` with a teacher.

    Args:
        model: the student.
        teacher: a dense model with the same vocabulary; it is put in evaluation mode on the trainer's
            device, and never trained.
        loss: see :class:`DistillationLoss`.
        freeze_embeddings: do not train the embeddings (nor a head tied to them), as the source does.
        others: as in ``Trainer``. Inputs need ``input_ids``, and may have ``attention_mask``, ``labels`` and
            ``seq_idx``, which says where documents begin for both models.

    Logged beside the loss: its parts, the mean ``|s|`` weighted by output width, SGC's lambda.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: SpikingMambaForCausalLM,
        teacher: SpikingMambaForCausalLM,
        loss: DistillationLoss | None = None,
        freeze_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        if teacher.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"The teacher's vocabulary has {teacher.config.vocab_size} tokens, "
                f"the student's {model.config.vocab_size}."
            )
        super().__init__(model, freeze_embeddings, **kwargs)
        self.loss = loss or DistillationLoss()
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        known = ("input_ids", "attention_mask", "labels", "seq_idx")
        inputs = {k: inputs[k] for k in known if inputs.get(k) is not None}
        arguments = {k: v for k, v in inputs.items() if k != "labels"}
        inputs.pop("seq_idx", None)  # of no concern to the loss
        # One position's logits only: the loss makes the others itself, a piece at a time.
        arguments |= {"output_hidden_states": True, "logits_to_keep": 1, "use_cache": False}
        asked = {"output_accumulations": model.training and self.loss.needs_accumulations}
        if model.training and self._log_due():
            with count_spikes(self.student, histogram=False) as spikes:
                output = model(**arguments, **asked)
            self._note_spikes(spikes)
        else:
            output = model(**arguments, **asked)
        with autocast(self):
            with torch.no_grad():
                teacher_output = self.teacher(**arguments) if self.loss.needs_teacher else None
            loss, parts = self.loss(self.student, self.teacher, output, teacher_output, **inputs)
        if model.training:
            self._note(**parts)
        return (loss, output) if return_outputs else loss


@schema
class DistillationSettings:
    """Settings of one distillation; every field is a key of the YAML file.

    Attributes:
        teacher: folder or hub name of a dense Mamba2 checkpoint.
        tokenizer: folder or hub name of its tokenizer; null where it lies beside the teacher.
        output: folder of the run: settings, checkpoints, log, and the student in ``model/``.
        data: text, see ``spiking_mamba.data.load_text``: a corpus that a package carries, a file, a hub
            name, or a list of them.
        length: tokens per row; rows are packed, see ``spiking_mamba.data.tokenize``.
        decontaminate: leave out documents that share 13 words in a row with what is evaluated, see
            ``spiking_mamba.data.contamination``; their number is printed.
        separate_documents: start both models afresh where a document begins within a row; false: they see
            what stands before it.
        neuron: ``{"class": ..., "args": {...}}``, see ``neurons.build``; null for a dense student, which
            ``loss: {kl: 0, cross_entropy: 1}`` trains like the teacher.
        sgc: Smoothed Gradient Compensation, see ``SpikingMambaConfig``; null for none.
        membrane: token or sequence.
        threshold: V_th: a number, or per projection, or a list per layer; or ``{"mean_abs": number}``, which
            calibrates one for each projection on the first rows, see ``spiking_mamba.training.calibration``.
        learn_threshold: train V_th.
        shift_inputs: let every input channel rest at a level of its own, at first its median on the first
            rows, and train the levels, see ``spiking_mamba.model.projection``.
        loss: fields of ``DistillationLoss``.
        freeze_embeddings: keep the teacher's embeddings.
        training: fields of transformers' ``TrainingArguments``; ``bf16: auto`` where it pays.
        seed: of data order and every random generator.
        compile: run the blocks through ``torch.compile``: true, false, or auto, which means on a GPU.
        resume: go on with the run in ``output``.
        overwrite: throw away the run in ``output``.
        dry_run: true rehearses with a small random teacher and random tokens, 'full' with one of the
            teacher's size; see ``spiking_mamba.training.rehearsal``.
    """

    teacher: Source
    output: Name
    data: Sources = field(default_factory=lambda: ["wikipedia-leads", "state-of-the-union"])
    tokenizer: Name | None = None
    length: Length = 256
    decontaminate: bool = True
    separate_documents: bool = True
    neuron: Neuron | None = field(
        default_factory=lambda: {"class": "neurons.SILIFNode", "args": {"max_spike_count": 4}}
    )
    sgc: Compensation | None = None
    membrane: Membrane = "token"
    threshold: Threshold = 1.0
    learn_threshold: bool = False
    shift_inputs: bool = False
    loss: Annotated[dict[str, Any], Keys(DistillationLoss)] = field(default_factory=dict)
    freeze_embeddings: bool = True
    training: Training = field(default_factory=dict)
    compile: Auto = "auto"
    seed: Seed = 0
    resume: bool = False
    overwrite: bool = False
    dry_run: Annotated[bool | Literal["full"], Words("true, false or 'full'")] = False

    def __post_init__(self) -> None:
        asked = self.neuron, self.sgc, self.membrane, self.threshold, self.learn_threshold
        check_student(*asked, self.shift_inputs)

    def make_loss(self) -> DistillationLoss:
        return DistillationLoss(**self.loss)

    def make_arguments(self) -> TrainingArguments:
        return training_arguments(Path(self.output), self.training, self.seed)

    def check(self, teacher: SpikingMambaConfig) -> None:
        """Raise what :func:`distill` would raise about these settings, before there is a teacher."""
        self.make_loss()
        if self.training.get("max_steps") != 0:  # nothing is trained
            self.make_arguments()
        self.check_student(teacher)

    def check_student(self, teacher: SpikingMambaConfig) -> None:
        """Raise what a student of such a teacher would raise."""
        names = ["neuron", "sgc", "membrane", "threshold", "learn_threshold", "shift_inputs"]
        if asks_for_calibration(self.threshold):
            names.remove("threshold")
        SpikingMambaConfig.from_dict(teacher.to_dict() | {name: getattr(self, name) for name in names})


def distill(
    settings: DistillationSettings,
    teacher: SpikingMambaForCausalLM | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    rows: Dataset | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[Path, list[dict[str, float]]]:
    """Distil a student as the settings say.

    Args:
        settings: every key of the recipe.
        teacher, tokenizer: what ``settings.teacher`` names, where they are in memory already.
        rows: ``input_ids`` of equal length instead of ``settings.data``; no tokenizer is needed then, and
            where none is given, the teacher's configuration says which token ends a text.
        callbacks: of transformers, to watch the training or end it early.

    Returns:
        The student's folder, and the log's rows.

    Raises:
        RunError, CheckpointError, DataError, ValueError: before anything is written or trained.
    """
    set_seed(settings.seed)
    loss = settings.make_loss()
    teacher = load_dense(settings.teacher) if teacher is None else teacher
    if tokenizer is None and rows is None:
        tokenizer = load_tokenizer(settings.teacher, settings.tokenizer)
    settings.check_student(teacher.config)  # tokenizing takes long
    arguments = settings.make_arguments()
    rows = _tokenized(settings, tokenizer) if rows is None else rows
    check_rows(rows, arguments, teacher.config.vocab_size)
    end = _end_of_text(settings, teacher.config if tokenizer is None else tokenizer)
    student = _student(settings, teacher, rows, arguments.device)
    compile_blocks(settings.compile, student, teacher)
    with (
        interruptible(lambda: kept_in(Path(settings.output))),
        run_folder(settings, settings.resume, settings.overwrite) as folder,
    ):
        trainer = DistillationTrainer(
            student,
            teacher,
            loss=loss,
            freeze_embeddings=settings.freeze_embeddings,
            args=arguments,
            train_dataset=rows,
            data_collator=partial(collate, end_of_text=end),
            callbacks=list(callbacks),
        )
        history = run(trainer, settings.resume)
        return finish_run(whole_model(trainer), tokenizer, folder), history


def _student(
    settings: DistillationSettings, teacher: SpikingMambaForCausalLM, rows: Dataset, device: torch.device
) -> SpikingMambaForCausalLM:
    """The student before distillation, the same on every process."""
    threshold, levels = _calibrated(settings, teacher, rows, device)
    student = SpikingMambaForCausalLM.from_dense(
        teacher,
        neuron=settings.neuron,
        sgc=settings.sgc,
        membrane=settings.membrane,
        threshold=threshold,
        learn_threshold=settings.learn_threshold,
        shift_inputs=settings.shift_inputs,
    )
    student.rest_at(levels)
    return student


def _tokenized(settings: DistillationSettings, tokenizer: PreTrainedTokenizerBase | None) -> Dataset:
    text = training_text(settings.data, "train", settings.decontaminate)
    return data.tokenize(text, tokenizer, settings.length)


def _end_of_text(
    settings: DistillationSettings, source: SpikingMambaConfig | PreTrainedTokenizerBase
) -> int | None:
    """The token between the documents of a row; None where they are not told apart."""
    end = source.eos_token_id if settings.separate_documents else None
    if isinstance(end, list):
        raise ValueError(
            f"One token parts the documents of a row, the teacher names {end}: pass a tokenizer."
        )
    return end


def first_threshold(
    settings: DistillationSettings, teacher: SpikingMambaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> Any:
    """V_th with which :func:`distill` begins: what the settings say, or what they have it calibrated to."""
    if not asks_for_calibration(settings.threshold):
        return settings.threshold
    rows = _tokenized(settings, tokenizer)
    return _calibrated(settings, teacher, rows, settings.make_arguments().device)[0]


def _calibrated(
    settings: DistillationSettings, teacher: SpikingMambaForCausalLM, rows: Dataset, device: torch.device
) -> tuple[Any, dict[str, torch.Tensor]]:
    """V_th, calibrated if the settings ask for it, and levels of inputs that are shifted.

    By the first process, for all.
    """
    if not (settings.shift_inputs or asks_for_calibration(settings.threshold)):
        return settings.threshold, {}
    resolved: list[Any] = [None]
    if PartialState().is_main_process:
        home, teacher = teacher.device, teacher.to(device)
        levels = calibrate_levels(teacher, first_rows(rows)) if settings.shift_inputs else None
        about = {"neuron": settings.neuron, "membrane": settings.membrane, "levels": levels}
        threshold = resolve_threshold(settings.threshold, teacher, rows, **about)
        teacher.to(home)
        resolved = [(threshold, {name: level.cpu() for name, level in (levels or {}).items()})]
    threshold, levels = broadcast_object_list(resolved)[0]
    return threshold, levels
