"""Counting spikes in the forward passes that a model makes anyway.

Hooks on the neurons add up spikes where they are, on the model's device: nothing is copied to the host, and
the host waits for nothing, until the ``with`` block ends or a number is read.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from spiking_mamba.model.backbone import SpikingMambaModel
from spiking_mamba.model.cache import CACHE_NAMES, one_cache
from spiking_mamba.model.projection import Spikes, spike_fed
from spiking_mamba.spikes.counts import Layout, ProjectionSpikes, SpikeCounts

if TYPE_CHECKING:
    pass

__all__ = ["count_spikes"]


class _Masks:
    """The attention mask of the forward pass under way, together with that of a cache's past."""

    def __init__(self) -> None:
        self.mask: torch.Tensor | None = None
        self.layouts: dict[int, Layout | None] = {}  # the projections of a pass share them
        self.past: WeakKeyDictionary[Any, torch.Tensor] = WeakKeyDictionary()  # masks by cache

    def before(self, backbone: SpikingMambaModel, args: tuple, kwargs: dict) -> None:
        given = inspect.signature(backbone.forward).bind(*args, **kwargs).arguments
        inputs, mask = given.get("input_ids"), given.get("attention_mask")
        cache = one_cache(**{name: given.get(name) for name in CACHE_NAMES})
        inputs = given.get("inputs_embeds") if inputs is None else inputs
        if inputs is None:
            return  # the model will say so
        batch, length = inputs.shape[:2]
        streams = backbone.stream.step_mode == "s" and not backbone.training
        if cache is None and streams and given.get("use_cache") is not False:
            cache = backbone.stream.cache
        past = None if cache is None else self.past.get(cache)
        if past is not None and (mask is None or mask.shape[1] < past.shape[1] + length):
            here = past.new_ones(batch, length) if mask is None else mask[:, -length:].bool()
            mask = torch.cat([past, here], 1)
        self.mask = mask
        self.here = (batch, length, inputs.device)

    def after(self, backbone: SpikingMambaModel, args: tuple, output: Any) -> None:
        cache = getattr(output, "cache", None)
        if cache is not None:
            batch, length, device = self.here
            ones = torch.ones(batch, length, dtype=torch.bool, device=device)
            self.past[cache] = ones if self.mask is None else self.mask.bool()
        self.mask = None
        self.layouts.clear()

    def layout(self, length: int) -> Layout | None:
        """Where the tokens of a projection's input are; ``None``: everywhere, from position 0."""
        if self.mask is None or self.mask.shape[1] < length:
            return None
        if length not in self.layouts:
            self.layouts[length] = Layout.of(self.mask, length)
        return self.layouts[length]


@contextmanager
def count_spikes(model: nn.Module, *, histogram: bool = True) -> Iterator[SpikeCounts]:
    """Count the spikes of every forward pass inside the ``with`` block.

    Padding (``attention_mask == 0``) is left out. What gradient checkpointing computes again in the
    backward pass is not counted again. Contexts may nest; for counts by task, give each task a context of
    its own and add them.

    A token's position is the number of tokens before it in its sequence. Left padding shifts nothing, and
    decoding with a cache (``generate()``, streams) goes on from the tokens before, those that a cache had
    taken in before this context excepted unless the attention mask covers them.

    A replayed CUDA graph runs no hooks, so nothing of it is counted.

    Args:
        model: a :class:`~spiking_mamba.SpikingMambaForCausalLM`, its backbone, or any module around them,
            on any device with float64. Padding is read from the backbone's arguments; projections that are
            called without it have none.
        histogram: count every level of ``-D .. D`` too; without it counting costs less.
    """
    projections = {name: p for name, p in spike_fed(model) if p.spikes.neuron is not None}
    counts = SpikeCounts(
        {
            name: ProjectionSpikes(
                p.in_features,
                p.out_features,
                p.spikes.max_spike_count,
                histogram,
                p.spikes.level is not None,
            )
            for name, p in projections.items()
        }
    )
    masks = _Masks()

    def counter(spikes: ProjectionSpikes):
        def count(encoder: nn.Module, args: tuple, output: Spikes) -> None:
            if torch._C._current_graph_task_id() != -1:  # recomputed by gradient checkpointing
                return
            assert output.emitted is not None
            # detached at once: what this saved for a backward pass, the recomputation would not
            spike = output.emitted.detach()  # [B, L, C]
            spikes.add(spike, masks.layout(spike.shape[1]))

        return count

    hooks = []
    for module in model.modules():
        if isinstance(module, SpikingMambaModel):
            hooks.append(module.register_forward_pre_hook(masks.before, with_kwargs=True))
            hooks.append(module.register_forward_hook(masks.after, always_call=True))
    for name, projection in projections.items():
        hooks.append(projection.spikes.register_forward_hook(counter(counts.projections[name])))
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()
        for spikes in counts.projections.values():
            spikes.to("cpu")
