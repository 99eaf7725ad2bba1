"""What a student is trained on: KL on logits, a hidden-state term, cross-entropy."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from spiking_mamba.model.cache import SpikingMambaCausalLMOutput
from spiking_mamba.model.modeling import SpikingMambaForCausalLM
from spiking_mamba.training.head_loss import head_loss
from spiking_mamba.training.spike_penalty import mean_spike_size, over_processes

__all__ = ["DistillationLoss", "hidden_loss", "token_mask"]

HIDDEN_KINDS = ("softmax_mse", "mse", "cosine")
HIDDEN_STATES = ("block", "mixer")


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

    'softmax_mse' is the source's ``1/2 ||softmax(y) - softmax(y')||^2`` (arXiv 2510.04595), 'mse' the same
    without softmax, divided by the teacher's mean square; 'cosine' is ``1 - cos``.
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


@dataclass
class DistillationLoss:
    """What the student is trained on: ``kl * KL + hidden * L_hidden + cross_entropy * CE + sparsity * S``.

    Every term is averaged over unmasked tokens, the hidden term over layers too. ``S`` is what the spikes
    cost: their mean ``|s|``, over projections weighted by output width as in ``SpikeCounts.mean_abs``, as far
    as it lies above a target. Its gradient passes through the neurons' surrogate.

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
    """

    temperature: float = 1.0
    kl: float = 1.0
    hidden: float = 0.0
    hidden_kind: str = "softmax_mse"
    hidden_states: str = "mixer"
    cross_entropy: float = 0.0
    sparsity: float = 0.0
    sparsity_target: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"loss.temperature must be positive, got {self.temperature}.")
        if (
            min(self.kl, self.hidden, self.cross_entropy) < 0
            or self.kl + self.hidden + self.cross_entropy == 0
        ):
            raise ValueError("The weights of the loss must not be negative, and one must be positive.")
        if self.sparsity < 0 or self.sparsity_target < 0:
            raise ValueError("loss.sparsity and loss.sparsity_target must not be negative.")
        if self.hidden_kind not in ("softmax_mse", "mse", "cosine"):
            raise ValueError(
                f"loss.hidden_kind must be softmax_mse, mse or cosine, got {self.hidden_kind!r}."
            )
        if self.hidden_states not in ("block", "mixer"):
            raise ValueError(f"loss.hidden_states must be block or mixer, got {self.hidden_states!r}.")

    @property
    def needs_teacher(self) -> bool:
        """Whether anything is compared with the teacher: not in a dense control on the data alone."""
        return bool(self.kl or self.hidden)

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
            student_output, teacher_output: made with ``output_hidden_states``; their last hidden states
                are what the heads turn into logits here, a piece at a time. The teacher's is used where
                ``needs_teacher`` says so.
            input_ids, attention_mask, labels: ``[B, L]``; labels are needed for the cross-entropy.

        A sparsity term needs a student's output made with ``output_accumulations``.
        """
        mask = token_mask(input_ids, attention_mask, labels)
        own, theirs, targets = student_output.hidden_states[-1][mask], None, None
        if self.kl:
            theirs = teacher_output.hidden_states[-1][mask], teacher.lm_head.weight
        if self.cross_entropy:
            if labels is None:
                raise ValueError("loss.cross_entropy needs labels.")
            targets = F.pad(labels[:, 1:], (0, 1), value=-100)[mask]
        loss, parts = head_loss(
            own,
            student.lm_head.weight,
            teacher=theirs,
            targets=targets,
            kl=self.kl,
            cross_entropy=self.cross_entropy,
            temperature=self.temperature,
            compiles=student.compiles,
        )
        if self.hidden:
            ours = self._compared(student, student_output, input_ids)
            others = self._compared(teacher, teacher_output, input_ids)
            terms = [
                hidden_loss(a[mask], b[mask], self.hidden_kind) for a, b in zip(ours, others, strict=True)
            ]
            parts["hidden"] = torch.stack(terms).mean()
            loss = loss + self.hidden * parts["hidden"]
        if self.sparsity and student.training:
            parts["spike_size"] = mean_spike_size(student, student_output.accumulations, mask)
            mean = over_processes(parts["spike_size"])
            loss = loss + self.sparsity * (mean - self.sparsity_target).clamp(min=0)
        return loss, {name: part.detach() for name, part in parts.items()}

    def _compared(
        self, model: Any, output: SpikingMambaCausalLMOutput, input_ids: torch.Tensor
    ) -> list[torch.Tensor]:
        # transformers lists the residual stream behind every block, then the last norm's output
        stream = list(output.hidden_states[:-1])
        if self.hidden_states == "block":
            return stream
        before = [model.get_input_embeddings()(input_ids), *stream[:-1]]
        return [after.float() - b.float() for after, b in zip(stream, before, strict=True)]
