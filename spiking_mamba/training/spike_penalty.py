"""What spikes cost, as a term of a loss: their gradient is that of the neurons' surrogate."""

import torch
from torch import distributed

from spiking_mamba.model.modeling import SpikingMambaForCausalLM

__all__ = ["mean_spike_size", "over_processes", "share_of_nonzero"]


def mean_spike_size(
    model: SpikingMambaForCausalLM, accumulations: torch.Tensor | None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean ``|s|``, weighted by output width as in ``SpikeCounts.mean_abs``; a float32 scalar.

    Args:
        model: the student.
        accumulations: of the model's output, ``[B, L]``.
        mask: ``[B, L]`` bool, which tokens count; None: all.

    Raises:
        ValueError: the model has no neurons, or its output was made without ``output_accumulations``.
    """
    return _by_weight(model, accumulations, mask, "size")


def share_of_nonzero(
    model: SpikingMambaForCausalLM, fetches: torch.Tensor | None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Share of non-zero counts, weighted by output width as in ``SpikeCounts.nonzero_share``.

    Of all weights the part that a token fetches; a float32 scalar.

    "Fires at all" has no slope. Its gradient here is that of ``clip(|u| - 1/2, 0, 1)``, which is 1 where the
    count is 1 and 0 elsewhere, so that counts that can be silenced are, and large ones are left alone.

    Args:
        model: the student.
        fetches: of the model's output, ``[B, L]``. mask: as in :func:`mean_spike_size`.

    Raises:
        ValueError: as :func:`mean_spike_size`.
    """
    return _by_weight(model, fetches, mask, "share")


def _by_weight(
    model: SpikingMambaForCausalLM, cost: torch.Tensor | None, mask: torch.Tensor | None, what: str
) -> torch.Tensor:
    """The mean of what tokens cost, for each weight of the projections."""
    projections = model.projections().values()
    if cost is None or not projections:
        raise ValueError(
            f"The spikes' {what} needs a spiking model's output, made with output_accumulations=True."
        )
    weight = sum(p.in_features * p.out_features for p in projections)
    if mask is None:
        return cost.mean() / weight
    return (cost * mask).sum() / mask.sum().clamp(min=1) / weight


def over_processes(size: torch.Tensor) -> torch.Tensor:
    """The mean of all processes' values, with the gradient of this process's own; a scalar.

    Processes average their gradients, so that the mean's whole gradient is what the optimiser gets, and a
    hinge of it is one hinge, not one for each process. The host does not wait.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return size
    mean = size.detach().clone()
    distributed.all_reduce(mean)
    return size + (mean / distributed.get_world_size() - size.detach())
