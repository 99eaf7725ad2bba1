"""Counting spikes on a GPU: exact, without waiting, and at what cost (marked gpu)."""

import statistics
import time
from contextlib import nullcontext

import pytest
import torch

from spiking_mamba import spikes as module
from spiking_mamba.spikes.counting import Layout, count_spikes
from spiking_mamba.spikes.counts import ProjectionSpikes
from spiking_mamba.spikes.joules import NoEnergyCounter, measure_joules
from tests.helpers.gpu_model import make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def both(spike, layout, levels=True):
    """The same spikes counted on the GPU and on the CPU."""
    there, here = (ProjectionSpikes(spike.shape[2], 3, 4, levels) for _ in range(2))
    cpu = None if layout is None else Layout(*(part.cpu() for part in layout))
    for _ in range(2):
        there.add(spike, layout)
        here.add(spike.cpu(), cpu)
    there.to("cpu")
    return there, here


@pytest.mark.parametrize("way", ["triton", "torch"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gpu_counts_what_the_cpu_counts(dtype, padded, way, monkeypatch):
    if way == "triton":
        pytest.importorskip("triton")
    else:
        monkeypatch.setattr(module, "_kernel", lambda: None)
    torch.manual_seed(0)
    for batch, length, channels in ((3, 500, 300), (1, 1, 16), (16, 2048, 1536)):
        spike = torch.randint(-4, 5, (batch, length, channels), device="cuda").to(dtype)
        layout = None
        if padded:
            mask = torch.randint(0, 2, (batch, length + 2), device="cuda")
            mask[:, -1] = 1
            layout = Layout.of(mask, length)
        for each in (spike, spike.transpose(0, 1).contiguous().transpose(0, 1)):
            there, here = both(each, layout)
            assert there.to_dict(detail=True) == here.to_dict(detail=True)
            assert torch.equal(there.channel_nonzero, here.channel_nonzero)


@pytest.mark.parametrize("padded", [False, True])
def test_the_host_does_not_wait(padded):
    model = make().eval()
    ids = torch.randint(0, 512, (4, 64), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    counted = ProjectionSpikes(128, 3, 4, count_levels=True)
    spike = torch.randint(-4, 5, (4, 64, 128), device="cuda").float()
    counted.add(spike, Layout.of(mask, 64) if padded else None)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        counted.add(spike, Layout.of(mask, 64) if padded else None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.no_grad(), count_spikes(model) as counts:
        model(ids, attention_mask=mask if padded else None)
    assert counts.tokens == (int(mask.sum()) if padded else 256)


def test_what_counting_costs(capsys):
    """Prints; `recipes/benchmark/spike_counting.py` has sizes as options. Fails only if out of hand."""
    model = make().eval()
    ids = torch.randint(0, 512, (16, 1024), device="cuda")
    times = {"plain": [], "counted": []}
    with torch.no_grad():
        for repeat in range(23):
            for name, way in (("plain", nullcontext()), ("counted", count_spikes(model, histogram=False))):
                with way:
                    model(ids, use_cache=False)
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    model(ids, use_cache=False)
                    torch.cuda.synchronize()
                    if repeat >= 3:
                        times[name].append(time.perf_counter() - start)
    plain, counted = (1e3 * statistics.median(each) for each in times.values())
    with capsys.disabled():
        print(f"\nforward {plain:.2f} ms, counted {counted:.2f} ms: {counted / plain - 1:+.1%}")
    assert counted < 1.5 * plain


def test_joules():
    model = make().eval()
    ids = torch.randint(0, 512, (16, 1024), device="cuda")
    try:
        with torch.no_grad():
            result = measure_joules(
                lambda: model(ids, use_cache=False),
                tokens_per_call=ids.numel(),
                seconds=3.0,
                idle_seconds=2.0,
            )
    except NoEnergyCounter as why:
        pytest.skip(str(why))
    assert result["joules_total"] > result["joules_net"] > 0
    assert 5 < result["idle_watts"] < 1000
