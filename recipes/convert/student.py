"""Distil a spiking student of a converted model, all blocks trained, mixers in the bits they are packed in.

python recipes/convert/student.py recipes/distill/smollm2-63.yaml
python -m torch.distributed.run --nproc-per-node 2 recipes/convert/student.py recipes/distill/smollm2-63.yaml
"""

from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from flat import FlatParameters, LowRankParameters, Together
from levels import least_error, uncut
from llama import Llama
from matching import SpikeMatching, Teacher, autocast
from pydantic import Field
from stage_settings import NotNegative, StageSettings
from train import STATE, Stage, run_stage

import neurons
from spiking_mamba.common.checkpoint_files import locate
from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.schema import Count, Fraction, Name, Natural, Positive, schema
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.model.checkpoint import load_dense
from spiking_mamba.model.modeling import SpikingMambaForCausalLM
from spiking_mamba.model.source import PACKAGES, load_source
from spiking_mamba.training.calibration import calibrate_levels, calibrate_thresholds
from spiking_mamba.training.student import Neuron

Share = Annotated[float, Field(gt=0, le=1)]


@schema
class StudentSettings(StageSettings):
    """Settings of a student; every field is a key of the YAML file.

    Attributes:
        start: folder of the dense model that the student starts from, packed mixers or whole.
        teacher: whose logits it learns: `start` where null, a folder, or the Transformer that `start` was
            converted from, see ``source.PACKAGES``.
        neuron: in front of every projection, mixers' and MLPs', see ``neurons.build``; null for a dense
            control.
        mean_abs, nonzero: the mean |s| and the share of non-zero counts, by output width and without each
            row's first token, for which thresholds are calibrated, and above which spikes are penalised;
            null: not asked for. Both null: thresholds that round with the least error, a quantiser's, and no
            penalty.
        size_weight, zeros_weight: of the penalties.
        cut: share of a projection's inputs, ends of text left out, that may be cut off at the neuron's
            largest count: thresholds calibrated lower are raised; null: as many as come.
        calibration: rows that thresholds and levels are calibrated on.
        shift_inputs: let every input channel rest at a level of its own, at first its median, see
            ``SpikingMambaConfig``.
        rank: of what is added to the MLPs' matrices, so that a small file holds it; 0: they stay as they are;
            null: they are trained whole.
        weight_decay: of matrices; of factors of a low rank none.
    """

    start: Name = field(kw_only=True)
    teacher: Name | None = None
    neuron: Neuron | None = None
    mean_abs: Positive | None = None
    nonzero: Share | None = None
    size_weight: NotNegative = 1.0
    zeros_weight: NotNegative = 1.0
    cut: Fraction | None = None
    calibration: Count = 8
    shift_inputs: bool = False
    rank: Natural | None = None
    # where a student differs from a stage
    bits: Annotated[int, Field(ge=0, le=8)] = 4
    own_share: Fraction = 0.8
    budget: Positive = 150.0
    learning_rate: Positive = 5e-4
    warmup: Natural = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neuron is None and (self.mean_abs or self.nonzero or self.shift_inputs):
            raise ValueError(
                "neuron: a dense control has no spikes to ask for: mean_abs and nonzero are null, and "
                "shift_inputs is false."
            )


Levels = dict[str, torch.Tensor]
LEVELS_IN = "activations"  # units of what a state keeps; up to commit cc580cc they were V_th


def thresholds(
    settings: StudentSettings, dense: SpikingMambaForCausalLM, ids: torch.Tensor
) -> tuple[Any, Levels | None]:
    """V_th of every projection, and the levels of its inputs, None where they are not shifted.

    By tokens ``[B, L]`` on the model's device, first ones left out.
    """
    if settings.neuron is None:
        return 1.0, None
    with autocast(ids):  # as in training, for which a GPU's kernels are tuned
        levels = calibrate_levels(dense, ids, first=1) if settings.shift_inputs else None
        if settings.mean_abs is None and settings.nonzero is None:
            return least_error(dense, ids, settings.neuron, first=1, levels=levels), levels
        targets = settings.mean_abs, settings.neuron
        layers = calibrate_thresholds(dense, ids, *targets, nonzero=settings.nonzero, first=1, levels=levels)
        if settings.cut is not None:
            most: Any = neurons.build(settings.neuron).max_spike_count
            layers = uncut(layers, dense, ids, int(most), settings.cut, levels)
        return layers, levels


def make_student(settings: StudentSettings, dense: Any, threshold: Any = 1.0) -> SpikingMambaForCausalLM:
    """A student of a dense model as it is before training."""
    return SpikingMambaForCausalLM.from_dense(
        dense,
        neuron=settings.neuron,
        threshold=threshold,
        learn_threshold=settings.neuron is not None,
        shift_inputs=settings.shift_inputs,
    )


def trained_parts(student: SpikingMambaForCausalLM, settings: StudentSettings, compiles: bool) -> Together:
    """All blocks' parameters: mixers in few bits, MLPs whole or as what a low rank adds to them."""
    kinds: dict[str, list[Any]] = {"mamba": [], "mlp": []}
    for number, block in enumerate(student.backbone.layers):
        kinds[student.config.block_type(number)].append(block)
    parts = [FlatParameters(kinds["mamba"], settings.bits, settings.group, compiles)]
    if kinds["mlp"] and settings.rank is None:
        parts.append(FlatParameters(kinds["mlp"]))
    elif kinds["mlp"]:
        generator = torch.Generator().manual_seed(settings.seed)
        parts.append(LowRankParameters(kinds["mlp"], settings.rank, generator))
    return Together(parts)


def load_teacher(name: str, dense: SpikingMambaForCausalLM, start: str, compiles: bool) -> Any:
    """What gives the hidden states and the head to learn from, on the device of ``dense``.

    It is ``dense`` itself where the names are one.
    """
    if name not in PACKAGES and locate(name)[1].get("model_type") != "llama":
        model = dense if name == start else load_dense(name).to(dense.device)
        return Teacher(model, compiles)
    dtype = torch.bfloat16 if dense.device.type == "cuda" else torch.float32
    source = Llama.from_transformers(load_source(name)).to(dense.device, dtype)
    return replace(source, compiles=compiles)


class StudentStage(Stage):
    """The training of a student on one process."""

    settings: Any

    @property
    def kind(self) -> str:
        return "student"

    def _lasting(self) -> dict[str, Any]:
        return super()._lasting() | {"levels_in": self.settings.shift_inputs and LEVELS_IN}

    def _build(self) -> None:
        settings = self.settings
        dense = load_dense(settings.start).requires_grad_(False).to(self.device)
        self.vocabulary = dense.config.vocab_size
        self.batches = self._batches()
        threshold: Any = 1.0
        levels: Levels | None = None
        state = self.folder / STATE
        if not state.is_file():
            threshold, levels = thresholds(settings, dense, self._calibration())
            self.say("calibrated")
        student = make_student(settings, dense, threshold)
        student.rest_at(levels or {})
        self.student = student.requires_grad_(False).train()
        for block in self.student.backbone.layers:
            block.requires_grad_(True)
        self.flat = trained_parts(self.student, settings, settings.compiles)
        self.optimizer = torch.optim.AdamW(
            self.flat.groups(settings.weight_decay), betas=(0.9, 0.95), fused=self.cuda
        )
        if state.is_file():
            self._resume()
        name = settings.teacher or settings.start
        teacher = load_teacher(name, dense, settings.start, settings.compiles)
        limits = ((settings.mean_abs, settings.size_weight), (settings.nonzero, settings.zeros_weight))
        self.match = SpikeMatching(teacher, self.student, settings.compiles, settings.piece, *limits)

    def _calibration(self) -> torch.Tensor:
        """The first rows of the texts in turn, the same on every process."""
        streams = [stream for stream, _ in self.batches.streams]
        count = -(-self.settings.calibration // len(streams))
        return torch.cat([stream.take(0, count) for stream in streams])[: self.settings.calibration]

    def losses(self, values: list[float]) -> dict[str, Any]:
        names = ("loss", "kl", "mean_abs", "nonzero")
        return {name: round(value, 5) for name, value in zip(names, values, strict=False)}


def restored_student(path: str | Path) -> tuple[SpikingMambaForCausalLM, Together, dict[str, Any]]:
    """The student of a stage's ``state.pt`` as training saw it, its parameters, and its progress.

    On the CPU, in evaluation mode.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    kept = dict(state["progress"]["settings"])
    levels_in = kept.pop("levels_in", None)
    settings = StudentSettings(**kept | {"output": "-", "piece": 1})
    student = make_student(settings, load_dense(settings.start))
    parts = trained_parts(student.requires_grad_(False), settings, False)
    parts.restore(state)
    if levels_in is None and settings.shift_inputs:
        with torch.no_grad():
            for projection in student.projections().values():
                projection.spikes.level.mul_(projection.spikes.threshold)  # type: ignore[union-attr,arg-type]
    return student.eval(), parts, state["progress"]


def load_student(path: str | Path) -> tuple[SpikingMambaForCausalLM, dict[str, Any]]:
    """:func:`restored_student` and its progress."""
    student, _, progress = restored_student(path)
    return student, progress


@fail_clearly()
def main() -> None:
    run_stage(StudentStage, parse_settings(StudentSettings, description=__doc__))


if __name__ == "__main__":
    main()
