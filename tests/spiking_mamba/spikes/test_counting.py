"""Spike counts against sums of recorded spikes, and against spikingjelly's own counters."""

import json
import math
from collections import defaultdict

import pytest
import torch
from spikingjelly.activation_based import functional
from spikingjelly.activation_based.op_counter import ACCounter, DispatchCounterMode, MACCounter
from torch.utils._python_dispatch import TorchDispatchMode

from spiking_mamba import SpikingMambaModel, spike_driven
from spiking_mamba.model.projection import SpikeEncoder, SpikingProjection
from spiking_mamba.spikes.counting import Layout, count_spikes
from spiking_mamba.spikes.counts import ProjectionSpikes, SpikeCounts
from tests.helpers.tiny import INTEGER, LEAKY, joined, recorded_spikes, tiny_model, tokens

MEMBRANES = pytest.mark.parametrize("membrane", ["token", "sequence"])


def spiking(membrane, **fields):
    return tiny_model(neuron=INTEGER if membrane == "token" else LEAKY, membrane=membrane, **fields)


def mask_of(ids):
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[1, -3:] = 0
    return mask


def before_padding(mask):
    """Where the blocks see the tokens of a mask: at the beginning of their rows."""
    return torch.arange(mask.shape[1]) < mask.sum(1, keepdim=True)


def check(counts, model, spikes, mask, kept_at=None):
    """``counts`` against ``spikes`` of shape ``[B, L, C]``, exactly."""
    kept_at = before_padding(mask) if kept_at is None else kept_at
    assert set(counts.projections) == set(spikes) == set(model.projections())
    accumulations = macs = nonzero = 0
    for name, projection in model.projections().items():
        counted, kept = counts.projections[name], spikes[name][kept_at].double()
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
            model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], cache=output.cache)
    kept_at = torch.cat([before_padding(mask[:, :8]), mask[:, 8:].bool()], 1)
    check(counts, model, joined(spikes), mask, kept_at)


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
            each.backbone.layers[0].mixer.in_spikes(x)
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
    assert not any(p.spikes._forward_hooks for p in model.projections().values())
    assert not model.backbone._forward_pre_hooks


@MEMBRANES
def test_padding_counts_as_nothing(membrane):
    """A padded row costs what it costs alone."""
    model, ids = spiking(membrane, threshold=0.5), tokens(1, 9)
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 0]])
    with torch.no_grad(), count_spikes(model) as padded:
        model(ids, attention_mask=mask)
    with torch.no_grad(), count_spikes(model) as alone:
        model(ids[mask.bool()][None])
    for name, counted in alone.projections.items():
        assert padded.projections[name].to_dict(detail=True) == counted.to_dict(detail=True)


@pytest.mark.parametrize("driven", [False, True])
@MEMBRANES
def test_spikingjellys_counters_agree(membrane, driven):
    """To the last operation. By itself it counts all but {0, 1} as dense: signed integers get rules."""
    mm = torch.ops.aten.mm.default  # what a linear map without bias comes down to
    model, ids = spiking(membrane, threshold=0.5), tokens(3, 9)
    model = spike_driven(model) if driven else model
    accumulate = ACCounter({mm: lambda args, kwargs, out: int(args[0].double().abs().sum()) * out.shape[1]})
    nonzero = MACCounter({mm: lambda args, kwargs, out: int(args[0].count_nonzero()) * out.shape[1]})
    dense = MACCounter({mm: lambda args, kwargs, out: args[0].numel() * out.shape[1]})
    with count_spikes(model) as counts, DispatchCounterMode([accumulate, nonzero, dense]), torch.no_grad():
        model(ids)
    for name, counted in counts.projections.items():
        scope = f"{type(model).__name__}.{name}"
        assert counted.accumulations == accumulate.get_counts()[scope][mm] > 0
        if not driven:
            assert counted.nonzero_macs == nonzero.get_counts()[scope][mm]
        if not driven:
            assert counted.dense_macs == dense.get_counts()[scope][mm]


@MEMBRANES
def test_positions_count_real_tokens(membrane):
    model, ids = spiking(membrane), tokens(3, 17)
    mask = mask_of(ids)
    mask[2, 5] = 0  # a hole
    with recorded_spikes(model) as spikes, count_spikes(model) as counts:
        model(ids, attention_mask=mask)
    done, dense = defaultdict(float), defaultdict(float)
    for name, projection in model.projections().items():
        sums, seen = defaultdict(float), defaultdict(int)
        for row in range(3):
            position = 0
            for t in range(17):
                if mask[row, t]:
                    sums[position] += float(spikes[name][0][row, position].abs().sum())
                    seen[position] += 1
                    position += 1
        width = projection.in_features
        expected = [sums[p] / (seen[p] * width) for p in sorted(seen)]
        assert counts.projections[name].position_mean_abs.tolist() == pytest.approx(expected, rel=1e-12)
        for p in seen:
            done[p] += sums[p] * projection.out_features
            dense[p] += seen[p] * width * projection.out_features
    expected = [done[p] / dense[p] for p in sorted(done)]
    assert counts.position_mean_abs.tolist() == pytest.approx(expected, rel=1e-12)
    assert counts.to_dict()["positions"] == counts.position_mean_abs.tolist()


def test_positions_go_on_with_a_cache_and_a_mask():
    model, ids = spiking("token"), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with count_spikes(model) as whole, torch.no_grad():
        model(ids, attention_mask=mask)
    with count_spikes(model) as pieces, torch.no_grad():
        cache = model(ids[:, :8], attention_mask=mask[:, :8], use_cache=True).cache
        for t in range(8, 12):
            model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], cache=cache)
    for name, counted in pieces.projections.items():
        seen = whole.projections[name]
        assert counted.position_tokens[:12].tolist() == seen.position_tokens.tolist() == [2] * 8 + [1] * 4
        assert len(counted.position_mean_abs) == 12
    with count_spikes(model) as generated, torch.no_grad():
        model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    for (
        counted
    ) in generated.projections.values():  # 8 and 12 tokens, then 4 more of each: the last is not fed
        assert counted.position_tokens[:16].tolist() == [2] * 12 + [1] * 4
    functional.set_step_mode(model, "s")
    with count_spikes(model) as streamed, torch.no_grad():
        for _ in range(2):
            for t in range(12):
                model(ids[:, t : t + 1])
            functional.reset_net(model)
    functional.set_step_mode(model, "m")
    with count_spikes(model) as plain, torch.no_grad():
        model(ids)
    for name, counted in streamed.projections.items():
        assert counted.position_tokens[:12].tolist() == [4] * 12
        assert counted.position_mean_abs.tolist() == pytest.approx(
            plain.projections[name].position_mean_abs.tolist(), rel=0.05
        )
    with count_spikes(model) as late, torch.no_grad():
        model(ids[:, :1], attention_mask=mask[:, :9], cache=cache)
    first = next(iter(late.projections.values())).position_mean_abs
    assert first[:4].isnan().all()
    assert late.to_dict()["positions"][:4] == [None] * 4


def test_counts_of_tasks_add_up():
    model = spiking("token")
    one, two = tokens(2, 9), tokens(1, 20, seed=1)
    with count_spikes(model) as together:
        model(one)
        model(two)
    tasks = []
    for ids in (one, two):
        with count_spikes(model) as counts:
            model(ids)
        tasks.append(counts)
    assert sum(tasks).to_dict(detail=True) == together.to_dict(detail=True)
    assert (tasks[0] + tasks[1]).to_dict() == together.to_dict()
    assert tasks[0].tokens == 18, "adding changed what was added"
    with count_spikes(model, histogram=False) as plain:
        model(one)
    assert (plain + tasks[0]).projections["backbone.layers.0.mixer.in_proj"].histogram is None
    with pytest.raises(ValueError, match="same model"):
        tasks[0] + SpikeCounts({})
    with pytest.raises(ValueError, match="same projection"):
        ProjectionSpikes(2, 3, 4) + ProjectionSpikes(2, 3, 5)


def test_the_backbone_alone_and_a_model_in_a_wrapper():
    model, ids = spiking("token"), tokens(3, 17)
    mask = mask_of(ids)
    with count_spikes(model) as whole:
        model(ids, attention_mask=mask)
    assert isinstance(model.backbone, SpikingMambaModel)
    with count_spikes(model.backbone) as bare:
        model.backbone(ids, None, None, None, None, None, mask)  # a mask by its place
    with count_spikes(torch.nn.ModuleDict({"student": model})) as wrapped:
        model(ids, attention_mask=mask)
    for other, change in ((bare, lambda n: n.removeprefix("backbone.")), (wrapped, lambda n: "student." + n)):
        got = other.to_dict()
        assert got["projections"] == {change(n): row for n, row in whole.to_dict()["projections"].items()}
        assert got["mean_abs"] == whole.mean_abs
    with count_spikes(model) as direct:
        with pytest.raises(ValueError):
            model(ids + 1000, attention_mask=mask)
        model.backbone.layers[0].mixer.in_spikes(torch.randn(3, 17, 32))
    assert direct.projections["backbone.layers.0.mixer.in_proj"].tokens == 51, "the mask outlived its pass"


def test_inference_mode_and_then_not():
    model, ids = spiking("token"), tokens(2, 5)
    with count_spikes(model) as counts:
        with torch.inference_mode():
            model(ids)
        model(ids)
        model(tokens(2, 50)).logits.sum().backward()
        with torch.inference_mode():
            model(ids, attention_mask=torch.ones_like(ids))
        model(ids)
    assert counts.tokens == 10 + 10 + 100 + 10 + 10


class Operations(TorchDispatchMode):
    """Records what is called."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.append((str(func), args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("histogram", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_nothing_makes_the_host_wait(padded, histogram):
    """On a GPU, reading a number or an output whose size depends on data would."""
    counted = ProjectionSpikes(6, 3, 4, histogram)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    with Operations() as operations:
        counted.add(torch.randint(-4, 5, (2, 4, 6)).float(), Layout.of(mask, 4) if padded else None)
    names = [name for name, _ in operations.called]
    assert any("abs" in name for name in names)
    waits = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "unique", "repeat_interleave")
    assert not [name for name in names if any(each in name for each in waits)]
    assert not [name for name in names if name.startswith(("aten.index.", "aten.index_put", "aten.equal"))]


def test_large_counts_are_exact():
    """Sums that float32 cannot hold, of more tokens than it can sum at once."""
    tokens = 17_000_000
    spike = torch.full((2, tokens // 2, 1), -3.0, dtype=torch.bfloat16)
    spike[0, 0] = 2
    spike[0, 1:4] = 0
    counted = ProjectionSpikes(1, 1, 3)
    counted.add(spike)
    assert counted.total == 3 * tokens - 1 - 9
    assert counted.total % 4, "float32 could hold it"
    assert counted.nonzero == tokens - 3
    assert counted.histogram.tolist() == [tokens - 4, 0, 0, 3, 0, 1, 0]
    assert counted.tokens == tokens
    for _ in range(2):  # float32 totals would stand still by now
        one = torch.ones(1, 1, 1)
        before = counted.total
        counted.add(one)
        assert counted.total == before + 1


def counts_of(spike, out_features):
    counted = ProjectionSpikes(spike.shape[1], out_features, 4)
    counted.add(spike.unsqueeze(0))
    return counted


def test_silent_channels():
    counted = counts_of(torch.tensor([[0.0, 2.0, 0.0, 0.0], [0.0, -1.0, 0.0, 1.0]]), 5)
    assert counted.silent_channels == 2
    assert counted.channel_mean_abs.tolist() == [0, 1.5, 0, 0.5]
    assert counted.channel_nonzero.tolist() == [0, 2, 0, 1]
    assert counted.per_token == 2.0
    assert counted.position_mean_abs.tolist() == [0.5, 0.5]


def test_plain_data():
    plain = SpikeCounts({"a": counts_of(torch.tensor([[0.0, 2.0, -1.0]]), 10)}).to_dict(detail=True)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    row = plain["projections"]["a"]
    assert (row["accumulations"], row["dense_macs"], row["silent_channels"]) == (30.0, 30.0, 1)
    assert row["histogram"] == [0, 0, 0, 1, 1, 0, 1, 0, 0]
    assert row["channels"] == [0, 2, 1]
    assert (plain["tokens"], plain["silent_channels"], plain["positions"]) == (1, 1, [1.0])


@pytest.mark.parametrize("spike", [torch.zeros(0, 3), torch.zeros(2, 3), torch.full((2, 3), math.nan)])
def test_plain_data_of_nothing_silence_and_nonsense(spike):
    counts = SpikeCounts({"a": counts_of(spike, 10)})
    plain = json.loads(json.dumps(counts.to_dict(detail=True), allow_nan=False))
    assert plain["mean_abs"] == (None if spike.isnan().any() else 0)
    assert SpikeCounts({}).to_dict()["mean_abs"] == 0


def test_frame():
    model = spiking("token")
    with count_spikes(model) as counts:
        model(tokens(2, 9))
    frame = counts.to_frame()
    assert list(frame.index) == [*model.projections(), "total"]
    numbers = ["in_features", "out_features", "mean_abs", "nonzero_share", "per_token", "silent_channels"]
    assert set(frame.columns) == {*numbers, "tokens", "accumulations", "dense_macs"}
    parts = frame.drop(index="total")
    assert parts["accumulations"].sum() == frame.loc["total", "accumulations"] == counts.accumulations
    weighted = (parts["mean_abs"] * parts["dense_macs"]).sum() / parts["dense_macs"].sum()
    assert frame.loc["total", "mean_abs"] == pytest.approx(weighted)
    name = "backbone.layers.1.mixer.out_proj"
    assert frame.loc[name, "mean_abs"] == counts.projections[name].mean_abs
    assert SpikeCounts({}).to_frame().shape[0] == 1  # a dense model's


def test_other_neurons_and_bare_projections():
    """Binary spikes of spikingjelly's nodes, in any module that holds a projection."""
    from spikingjelly.activation_based import neuron

    layer = SpikingProjection(
        torch.nn.Linear(4, 3), SpikeEncoder(neuron.IFNode(v_threshold=0.5), membrane="sequence")
    )
    x = torch.tensor([[[0.6, 0.3, 0.0, 5.0], [0.0, 0.3, 0.0, -9.0]]])
    with count_spikes(torch.nn.Sequential(layer)) as counts:
        layer(x)
    (counted,) = counts.projections.values()
    assert counted.channel_sum.tolist() == [1, 1, 0, 1]
    assert counted.histogram.tolist() == [0, 5, 3]


def test_counts_that_are_not_finite_are_not_known():
    spikes = ProjectionSpikes(3, 2, max_spike_count=4)
    spikes.add(torch.tensor([[[1.0, 0.0, -4.0], [0.0, math.nan, 2.0]]]))
    row = spikes.to_dict()
    names = ("mean_abs", "nonzero_share", "per_token", "accumulations", "histogram")
    assert [row[name] for name in names] == [None] * 5
    assert spikes.signed_digits is None
    assert math.isnan(spikes.nonzero_macs)
    json.dumps(row, allow_nan=False)
