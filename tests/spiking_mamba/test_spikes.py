"""Spike counts against sums of recorded spikes, and energy by hand."""

import pytest
import torch
from spikingjelly.activation_based import functional
from tiny import INTEGER, LEAKY, joined, recorded_spikes, tiny_model, tokens

from spiking_mamba import spike_driven
from spiking_mamba.energy import COSTS_45NM, projection_energy
from spiking_mamba.spikes import ProjectionSpikes, SpikeCounts, count_spikes

MEMBRANES = pytest.mark.parametrize("membrane", ["token", "sequence"])


def spiking(membrane, **fields):
    return tiny_model(neuron=INTEGER if membrane == "token" else LEAKY, membrane=membrane, **fields)


def mask_of(ids):
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[1, -3:] = 0
    return mask


def check(counts, model, spikes, mask):
    """``counts`` against ``spikes`` of shape ``[B, L, C]``, exactly."""
    assert set(counts.projections) == set(spikes) == set(model.projections())
    accumulations = macs = nonzero = 0
    for name, projection in model.projections().items():
        counted, kept = counts.projections[name], spikes[name][mask.bool()].double()
        total = kept.abs().sum().item()
        assert total > 0
        assert counted.tokens == len(kept) == int(mask.sum())
        assert counted.total == total
        assert counted.accumulations == total * projection.out_features
        assert counted.dense_macs == kept.numel() * projection.out_features
        assert counted.nonzero == int((kept != 0).sum())
        assert counted.mean_abs == pytest.approx(kept.abs().mean().item(), rel=1e-12)
        assert counted.nonzero_share == pytest.approx((kept != 0).double().mean().item(), rel=1e-12)
        assert counted.silent_channels == int((kept == 0).all(0).sum())
        assert torch.equal(counted.channel_sum, kept.abs().sum(0))
        assert counted.histogram.tolist() == [int((kept == level).sum()) for level in range(-4, 5)]
        accumulations += total * projection.out_features
        macs += kept.numel() * projection.out_features
        nonzero += int((kept != 0).sum()) * projection.out_features
    assert (counts.accumulations, counts.dense_macs, counts.nonzero_macs) == (accumulations, macs, nonzero)
    assert counts.mean_abs == pytest.approx(accumulations / macs, rel=1e-12)
    assert counts.nonzero_share == pytest.approx(nonzero / macs, rel=1e-12)


@pytest.mark.parametrize("padded", [False, True])
@MEMBRANES
def test_counts_equal_recorded_spikes(membrane, padded):
    model, ids = spiking(membrane, threshold=0.5), tokens(3, 17)
    mask = mask_of(ids) if padded else torch.ones_like(ids)
    with recorded_spikes(model) as spikes, count_spikes(model) as counts:
        model(ids, attention_mask=mask if padded else None)
        model(ids, attention_mask=mask if padded else None)
    doubled = {name: torch.cat(calls) for name, calls in spikes.items()}
    check(counts, model, doubled, torch.cat([mask, mask]))
    model(ids)
    assert next(iter(counts.projections.values())).tokens == 2 * mask.sum(), "it counts after the with block"


@MEMBRANES
def test_the_mask_of_one_call_does_not_reach_the_next(membrane):
    model, ids = spiking(membrane), tokens(2, 9)
    with count_spikes(model) as counts:
        model(ids, attention_mask=mask_of(ids))
        model(ids)
    assert {p.tokens for p in counts.projections.values()} == {int(mask_of(ids).sum()) + 18}


@MEMBRANES
def test_a_cache_and_a_mask_that_covers_the_past(membrane):
    model, ids = spiking(membrane), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with recorded_spikes(model) as spikes, count_spikes(model) as counts, torch.no_grad():
        output = model(ids[:, :8], attention_mask=mask[:, :8], use_cache=True)
        for t in range(8, 12):
            model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], cache_params=output.cache_params)
    check(counts, model, joined(spikes), mask)


@MEMBRANES
def test_a_stream(membrane):
    model, ids = spiking(membrane), tokens(2, 6)
    functional.set_step_mode(model, "s")
    with recorded_spikes(model) as spikes, count_spikes(model) as counts, torch.no_grad():
        for piece in ids.split(1, dim=1):
            model(piece)
    check(counts, model, joined(spikes), torch.ones_like(ids))


@MEMBRANES
def test_spike_driven_counts_are_the_integers(membrane):
    model, ids = spiking(membrane), tokens(2, 9)
    driven = spike_driven(model)
    x = torch.randn(2, 9, 32)
    with count_spikes(model) as integers, count_spikes(driven) as unrolled:
        for each in (model, driven):
            each.backbone.layers[0].mixer.in_proj(x)
    name = "backbone.layers.0.mixer.in_proj"
    assert integers.projections[name].total == unrolled.projections[name].total > 0
    with recorded_spikes(driven) as spikes, count_spikes(driven) as counts:
        driven(ids)
    check(counts, driven, joined(spikes), torch.ones_like(ids))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@MEMBRANES
def test_gradient_checkpointing_counts_once(membrane, reentrant):
    model, ids = spiking(membrane).train(), tokens(2, 11)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with recorded_spikes(model) as spikes, count_spikes(model) as counts:
        model(ids, attention_mask=mask_of(ids), labels=ids).loss.backward()
    assert {len(calls) for calls in spikes.values()} == {2}, "nothing was recomputed"
    check(counts, model, {name: calls[0] for name, calls in spikes.items()}, mask_of(ids))


def test_counts_in_bfloat16_are_exact():
    model, ids = spiking("token", threshold=0.25), tokens(8, 64)
    with (
        recorded_spikes(model) as spikes,
        count_spikes(model) as counts,
        torch.autocast("cpu", torch.bfloat16),
    ):
        model(ids)
    assert max(p.channel_sum.max() for p in counts.projections.values()) > 256  # beyond bfloat16's integers
    check(counts, model, joined(spikes), torch.ones_like(ids))


def test_contexts_nest_and_leave_no_hooks():
    model, ids = spiking("token"), tokens(1, 5)
    with count_spikes(model) as outer:
        model(ids)
        with count_spikes(model) as inner:
            model(ids)
    assert outer.accumulations == 2 * inner.accumulations
    assert not any(p.neuron._forward_hooks for p in model.projections().values())
    assert not model.backbone._forward_pre_hooks


def counts_of(spike, out_features):
    counted = ProjectionSpikes(spike.shape[1], out_features, 4)
    counted.add(spike.unsqueeze(0))
    return counted


def test_energy_by_hand():
    """Mean |s| = r gives 4.6 / (0.9 r) in float32; two projections are weighted by their width."""
    first = counts_of(torch.tensor([[0.0, 2.0, -1.0, 0.0], [0.0, 0.0, 3.0, 0.0]]), 10)  # 6 of 8, 3 not zero
    only = projection_energy(SpikeCounts({"a": first}))
    assert only["fp32"] == pytest.approx(4.6 / (0.9 * 0.75))
    assert only["fp16"] == pytest.approx(1.5 / (0.4 * 0.75))
    assert only["int8"] == only["quantised"] == pytest.approx(0.23 / (0.03 * 0.75))
    assert only["quantised_sparse"] == pytest.approx(0.23 * 30 / (0.03 * 60))
    second = counts_of(torch.tensor([[-4.0, 4.0]]), 3)  # 8 of 2
    both = projection_energy(SpikeCounts({"a": first, "b": second}))
    assert both["fp32"] == pytest.approx((80 + 6) * 4.6 / ((60 + 24) * 0.9))
    worse = projection_energy(SpikeCounts({"b": second}))
    assert worse["int8"] == pytest.approx(0.23 / (0.03 * 4))
    assert COSTS_45NM["fp32"].mac / (4 * COSTS_45NM["fp32"].ac) == pytest.approx(worse["fp32"])


def test_energy_without_a_spike():
    silent = projection_energy(SpikeCounts({"a": counts_of(torch.zeros(3, 2), 5)}))
    assert set(silent.values()) == {float("inf")}


def test_plain_data():
    import json

    plain = SpikeCounts({"a": counts_of(torch.tensor([[0.0, 2.0, -1.0]]), 10)}).to_dict()
    assert json.loads(json.dumps(plain)) == plain
    row = plain["projections"]["a"]
    assert (row["accumulations"], row["dense_macs"], row["silent_channels"]) == (30.0, 30.0, 1)
    assert row["histogram"] == [0, 0, 0, 1, 1, 0, 1, 0, 0]
