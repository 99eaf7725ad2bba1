"""What a student is trained on: a weighted sum of the entries of ``TERMS``.

``TERMS`` is the one place of a term: trainer, log and settings go through it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch.nn import functional as F

from spiking_mamba.common.schema import Fraction, Positive, schema
from spiking_mamba.model.cache import SpikingMambaCausalLMOutput
from spiking_mamba.model.modeling import SpikingMambaForCausalLM
from spiking_mamba.training.head_loss import head_loss
from spiking_mamba.training.spike_penalty import mean_spike_size, over_processes, share_of_nonzero

__all__ = ["TERMS", "Batch", "DistillationLoss", "Term", "compared_states", "hidden_loss", "token_mask"]

Weight = Annotated[float, Field(ge=0)]


def token_mask(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, labels: torch.Tensor | None
) -> torch.Tensor:
    """Which positions count, ``[B, L]`` bool: tokens, not padding, whose next label is not -100."""
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if labels is not None:
        mask = mask & F.pad(labels[:, 1:] != -100, (0, 1), value=False)
    return mask


def hidden_loss(student: torch.Tensor, teacher: torch.Tensor, kind: str = "softmax_mse") -> torch.Tensor:
    """Distance of two hidden states ``[N, hidden_size]``, averaged over the positions; float32.

    'softmax_mse' is the source's ``1/2 ||softmax(y) - softmax(y')||^2`` (arXiv 2510.04595), 'mse' the mean
    square of the channels' differences, divided by the teacher's mean square; 'cosine' is ``1 - cos``.
    """
    student, teacher = student.float(), teacher.float()
    if not len(student):
        return student.sum()  # 0 with a graph, not the NaN of an empty mean
    if kind == "softmax_mse":
        return (student.softmax(-1) - teacher.softmax(-1)).square().sum(-1).mean() / 2
    if kind == "mse":
        return (student - teacher).square().mean() / teacher.square().mean().clamp_min(1e-6)
    if kind == "cosine":
        return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()
    raise ValueError(f"Unknown hidden loss {kind!r}.")


@dataclass(frozen=True)
class Batch:
    """What a term sees of one batch.

    Attributes:
        student, teacher: the models.
        student_output, teacher_output: theirs, with ``hidden_states``; the teacher's is None where no term
            in use compares with it. The student's has ``accumulations`` where a term asked for them.
        input_ids: ``[B, L]`` int64.
        mask: ``[B, L]`` bool, the positions that count, see :func:`token_mask`.
        labels: ``[B, L]`` int64, -100 where there is nothing to predict; or None.
    """

    student: SpikingMambaForCausalLM
    teacher: Any
    student_output: Any
    teacher_output: Any
    input_ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor | None


def compared_states(model: Any, output: Any, input_ids: torch.Tensor, kind: str) -> list[torch.Tensor]:
    """The hidden states ``[B, L, hidden_size]`` of every block that the hidden term compares.

    Args:
        model: of this package. output: made with ``output_hidden_states``. input_ids: ``[B, L]``, of it.
        kind: 'block', the residual stream behind a block, or 'mixer', what the block adds to it; float32.
    """
    # transformers lists the residual stream behind every block, then the last norm's output
    stream = list(output.hidden_states[:-1])
    if kind == "block":
        return stream
    before = [model.get_input_embeddings()(input_ids), *stream[:-1]]
    return [after.float() - b.float() for after, b in zip(stream, before, strict=True)]


_Added = tuple[torch.Tensor, dict[str, torch.Tensor]]  # to the loss, weighted; parts for the log, as they are


def _head_terms(loss: "DistillationLoss", batch: Batch) -> _Added:
    """KL and cross-entropy, from one pass over the logits."""
    theirs, targets = None, None
    if loss.kl:
        theirs = batch.teacher_output.hidden_states[-1][batch.mask], batch.teacher.lm_head.weight
    if loss.cross_entropy:
        if batch.labels is None:
            raise ValueError("loss.cross_entropy needs labels.")
        targets = F.pad(batch.labels[:, 1:], (0, 1), value=-100)[batch.mask]
    return head_loss(
        batch.student_output.hidden_states[-1][batch.mask],
        batch.student.lm_head.weight,
        teacher=theirs,
        targets=targets,
        kl=loss.kl,
        cross_entropy=loss.cross_entropy,
        temperature=loss.temperature,
        compiles=batch.student.compiles,
    )


def _hidden_term(loss: "DistillationLoss", batch: Batch) -> _Added:
    ours = compared_states(batch.student, batch.student_output, batch.input_ids, loss.hidden_states)
    others = compared_states(batch.teacher, batch.teacher_output, batch.input_ids, loss.hidden_states)
    pairs = zip(ours, others, strict=True)
    distances = [hidden_loss(a[batch.mask], b[batch.mask], loss.hidden_kind) for a, b in pairs]
    part = torch.stack(distances).mean()
    return loss.hidden * part, {"hidden": part}


def _sparsity_term(loss: "DistillationLoss", batch: Batch) -> _Added:
    part = mean_spike_size(batch.student, batch.student_output.accumulations, batch.mask)
    excess = (over_processes(part) - loss.sparsity_target).clamp(min=0)
    return loss.sparsity * excess, {"spike_size": part}


def _zeros_term(loss: "DistillationLoss", batch: Batch) -> _Added:
    part = share_of_nonzero(batch.student, batch.student_output.fetches, batch.mask)
    excess = (over_processes(part) - loss.nonzero_target).clamp(min=0)
    return loss.zeros * excess, {"nonzero": part}


@dataclass(frozen=True)
class Term:
    """One term of the loss.

    Attributes:
        function: of the :class:`DistillationLoss` and a :class:`Batch`: what is added to the loss, weighted,
            and unweighted parts for the log. It is called where the weight is positive, once for all terms
            that share it.
        title: of its column in the table that a training prints; four decimals.
        field: of ``DistillationLoss``, its weight; None: its weight is ``loss.weights.<name>``.
        teacher: it compares with the teacher.
        accumulations: it needs the student's ``output_accumulations``; such a term is left out of
            evaluation, where spikes are counted anyway.
    """

    function: Callable[["DistillationLoss", Batch], _Added]
    title: str
    field: str | None = None
    teacher: bool = True
    accumulations: bool = False


# By the names of their parts in the log, in the order of its columns.
TERMS = {
    "kl": Term(_head_terms, "KL", "kl"),
    "hidden": Term(_hidden_term, "hidden", "hidden"),
    "ce": Term(_head_terms, "CE", "cross_entropy", teacher=False),
    "spike_size": Term(_sparsity_term, "spike size", "sparsity", teacher=False, accumulations=True),
    "nonzero": Term(_zeros_term, "non-zero", "zeros", teacher=False, accumulations=True),
}


@schema
class DistillationLoss:
    """``kl * KL + hidden * L_hidden + cross_entropy * CE + sparsity * S + zeros * Z``, of a student.

    What it is trained on.

    Every term is averaged over unmasked tokens, the hidden term over layers too. ``S`` is what the spikes
    cost: their mean ``|s|``, over projections weighted by output width as in ``SpikeCounts.mean_abs``, as far
    as it lies above a target. Its gradient passes through the neurons' surrogate. ``Z`` is the share of
    counts that are not zero, weighted likewise, as far as it lies above a target of its own: see
    ``spike_penalty.share_of_nonzero``.

    Attributes:
        temperature: of both softmaxes in the KL term, > 0.
        kl: weight of ``KL(teacher || student)`` on the logits.
        hidden: weight of the hidden-state term.
        hidden_kind: 'softmax_mse' (the source's), 'mse' or 'cosine'.
        hidden_states: 'block' compares the residual stream behind every block, 'mixer' what every block
            adds to it, which is the output of its out_proj.
        cross_entropy: weight of the next-token cross-entropy on the data.
        sparsity: weight of ``S = max(0, mean |s| - sparsity_target)``. The mean is over the batch of all
            processes; rows that are accumulated in several batches are hinged batch by batch, since whether
            the step's mean lies above the target is known only when the first ones' graphs are gone. The two
            are equal where every batch's mean lies on the same side of the target, and always for a target
            of 0; else the accumulated S is the larger one.
        sparsity_target: mean ``|s|`` below which nothing is penalised; 0 penalises every spike.
        zeros: weight of ``Z = max(0, share of non-zero counts - nonzero_target)``, hinged as ``S`` is.
        nonzero_target: share below which nothing is penalised.
        weights: of further terms, by their names in ``TERMS``.
    """

    temperature: Positive = 1.0
    kl: Weight = 1.0
    hidden: Weight = 0.0
    hidden_kind: Literal["softmax_mse", "mse", "cosine"] = "softmax_mse"
    hidden_states: Literal["mixer", "block"] = "mixer"
    cross_entropy: Weight = 0.0
    sparsity: Weight = 0.0
    sparsity_target: Weight = 0.0
    zeros: Weight = 0.0
    nonzero_target: Fraction = 0.0
    weights: dict[str, Weight] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_weights()
        if not sum([self.kl, self.hidden, self.cross_entropy, *self.weights.values()]):
            raise ValueError("One of the weights of the loss must be positive.")

    def _check_weights(self) -> None:
        for name in self.weights:
            if name not in TERMS:
                raise ValueError(f"Unknown term {name!r} in loss.weights; known are {', '.join(TERMS)}.")
            if (key := TERMS[name].field) is not None:
                raise ValueError(f"The weight of {name} is loss.{key}, not loss.weights.{name}.")

    def weight(self, name: str) -> float:
        """Of the term ``name`` of ``TERMS``."""
        key = TERMS[name].field
        return self.weights.get(name, 0.0) if key is None else getattr(self, key)

    def _in_use(self) -> list[Term]:
        return [term for name, term in TERMS.items() if self.weight(name)]

    @property
    def needs_teacher(self) -> bool:
        """Whether anything is compared with the teacher: not in a dense control on the data alone."""
        return any(term.teacher for term in self._in_use())

    @property
    def needs_accumulations(self) -> bool:
        """Whether training needs the student's ``output_accumulations``."""
        return any(term.accumulations for term in self._in_use())

    def __call__(
        self,
        student: SpikingMambaForCausalLM,
        teacher: torch.nn.Module,
        student_output: SpikingMambaCausalLMOutput,
        teacher_output: SpikingMambaCausalLMOutput | None,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss, and its parts for the log.

        Args:
            student, teacher: the models that made the outputs.
            student_output, teacher_output: made with ``output_hidden_states``; their last hidden states
                are what the heads turn into logits here, a piece at a time. The teacher's is used where
                ``needs_teacher`` says so.
            input_ids, attention_mask, labels: ``[B, L]``; labels are needed for the cross-entropy.

        The terms of spikes need a student's output made with ``output_accumulations``.
        """
        mask = token_mask(input_ids, attention_mask, labels)
        batch = Batch(student, teacher, student_output, teacher_output, input_ids, mask, labels)
        terms = [term for term in self._in_use() if student.training or not term.accumulations]
        loss = torch.zeros((), device=mask.device)
        parts: dict[str, torch.Tensor] = {}
        for function in dict.fromkeys(term.function for term in terms):
            added, logged = function(self, batch)
            loss, parts = loss + added, parts | logged
        return loss, {name: part.detach() for name, part in parts.items()}
