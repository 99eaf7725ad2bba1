"""The model on a GPU (marked gpu: Triton's scan and CuPy's neurons need one)."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from spikingjelly.activation_based import functional

from neurons import set_backend
from spiking_mamba.model import scan as ssd
from tests.helpers import scans
from tests.helpers.gpu_model import make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: it runs Triton and CuPy"),
]
needs_mamba_ssm = pytest.mark.skipif(
    importlib.util.find_spec("mamba_ssm") is None, reason="compares with mamba-ssm's kernels: make gpu"
)
needs_causal_conv1d = pytest.mark.skipif(
    importlib.util.find_spec("causal_conv1d") is None,
    reason="compares with causal-conv1d: make gpu",
)


@pytest.fixture(autouse=True, scope="module")
def untuned():
    """The smallest tile of each of mamba-ssm's kernels: what is compared does not depend on it, and tuning
    takes minutes."""
    if importlib.util.find_spec("mamba_ssm") is not None:
        scans.spare_tuning()


def convolve(x, weight, bias):
    """``[B, L, C]``, tap by tap, in float64."""
    x, weight, bias = (tensor.double() for tensor in (x, weight, bias))
    padded = torch.nn.functional.pad(x, (0, 0, weight.shape[1] - 1, 0))
    y = sum(padded[:, k : k + x.shape[1]] * weight[:, k] for k in range(weight.shape[1])) + bias
    return y * y.sigmoid()


@needs_causal_conv1d
@pytest.mark.parametrize("width", [176, 171])  # the kernel reads eight channels at a time; torch takes any
@pytest.mark.parametrize("length", [1, 2, 63, 300])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_the_convolution_is_causal_conv1ds(dtype, bound, length, width, monkeypatch):
    calls, fn = [], ssd._conv_kernels().causal_conv1d_fn
    monkeypatch.setattr(
        ssd._conv_kernels(), "causal_conv1d_fn", lambda *a, **k: calls.append(1) or fn(*a, **k)
    )
    torch.manual_seed(0)
    projected = torch.randn(2, length, width, device="cuda").to(dtype).requires_grad_()
    weight, bias = (torch.randn(*size, device="cuda").requires_grad_() for size in ((128, 4), (128,)))
    upstream = torch.randn(2, length, 128, device="cuda").to(dtype)
    leaves, found = (projected, weight, bias), []
    for function in (lambda *args: ssd.causal_conv1d(*args, "silu"), convolve):
        y = function(projected[..., 16:144], weight, bias)
        found.append([y, *torch.autograd.grad(y, leaves, upstream.to(y.dtype))])
    assert len(calls) == (width % 8 == 0)
    for ours, right in zip(*found, strict=True):
        assert (ours - right).abs().max() <= bound * right.abs().max()


@needs_mamba_ssm
@pytest.mark.parametrize("length", scans.LENGTHS)
def test_the_scans_agree_in_bf16(length):
    assert scans.largest_difference(length, torch.bfloat16) <= 2e-2


@needs_mamba_ssm
def test_the_scans_agree_in_float32(tmp_path):
    """In a process of its own, since Triton multiplies in TF32 unless this is set before it compiles."""
    environment = {"TRITON_F32_DEFAULT": "ieee", "TRITON_CACHE_DIR": str(tmp_path)}
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, scans.__file__],
        env=os.environ | environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    differences = json.loads(done.stdout)
    assert len(differences) == len(scans.LENGTHS)
    assert max(differences) <= 1e-4


@pytest.mark.parametrize("membrane", ["token", "sequence"])
def test_cupy_computes_the_same_model(membrane):
    model = make(membrane)
    input_ids = torch.randint(0, 512, (2, 100), device="cuda")
    results = []
    for backend in ("torch", "cupy"):
        set_backend(model, backend)
        loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        gradient = model.backbone.layers[0].mixer.in_proj.weight.grad.clone()
        model.zero_grad()
        results.append((loss.detach(), gradient))
    (loss, gradient), (cupy_loss, cupy_gradient) = results
    torch.testing.assert_close(cupy_loss, loss, rtol=1e-6, atol=1e-6)
    # the scan's own atomics move the last bits of a gradient from run to run
    assert (cupy_gradient - gradient).abs().max() <= 1e-4 * gradient.abs().max()


@pytest.mark.parametrize("membrane", ["token", "sequence"])
def test_streaming_on_a_gpu(membrane):
    model = make(membrane).eval()
    set_backend(model, "cupy")
    input_ids = torch.randint(0, 512, (2, 20), device="cuda")
    with torch.no_grad():
        full = model(input_ids).logits
        functional.set_step_mode(model, "s")
        streamed = torch.cat([model(token[:, None]).logits for token in input_ids.unbind(1)], 1)
    assert (streamed - full).abs().max() <= 1e-2 * full.abs().max()


def test_bf16_training_lowers_the_loss():
    model = make(sgc={"mode": "blend"})
    set_backend(model, "cupy")
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    input_ids = torch.randint(0, 512, (4, 128), device="cuda")
    losses = []
    for _ in range(20):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_compiled_blocks_equal_uncompiled_ones():
    """Losses and gradients in float32; a spike at a tie may tip, so only most of a gradient has to agree."""
    for fields in ({"neuron": None, "threshold": 1.0}, {}, {"sgc": {"mode": "blend"}}):
        for backend in ("torch", "cupy"):
            model = make(**fields)
            set_backend(model, backend)
            input_ids = torch.randint(0, 512, (2, 100), device="cuda")
            results = []
            for compiles in (False, True):
                model.compile_blocks(compiles)
                loss = model(input_ids, labels=input_ids).loss
                results.append((loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))))
            (loss, *gradients), (compiled_loss, *compiled) = results
            torch.testing.assert_close(compiled_loss, loss, rtol=1e-3, atol=1e-3)
            for one, other in zip(gradients, compiled, strict=True):
                similarity = torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0)
                assert similarity > 0.99 or one.norm() < 1e-6


@pytest.mark.parametrize("membrane", ["token", "sequence"])
def test_captured_decoding(membrane):
    """Streams of two models' worth of sequences that take turns, against whole passes."""
    model = make(membrane).eval()
    model.capture_decoding()
    ids = [torch.randint(0, 512, (2, 12), device="cuda") for _ in range(2)]
    with torch.no_grad():
        expected = [model(i, use_cache=False).logits[:, 4:] for i in ids]
        caches = [model(i[:, :4], use_cache=True).cache for i in ids]
        logits = [[], []]
        for at in range(4, 12):
            for which in (0, 1):
                token = ids[which][:, at : at + 1]
                output = model(token, cache=caches[which], use_cache=True)
                logits[which].append(output.logits)
    assert len(model.graphs) == 1
    for found, wanted in zip(logits, expected, strict=True):
        assert (torch.cat(found, 1) - wanted).abs().max() <= 1e-2 * wanted.abs().max()
    generated = model.generate(ids[0], max_new_tokens=8, do_sample=False, num_beams=2)
    assert generated.shape == (2, 20)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_captured_generation_on_a_device_that_is_not_the_current_one():
    model = make().eval()
    ids = torch.randint(0, 512, (2, 12), device="cuda:0")
    settings = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    model.capture_decoding()
    wanted = model.generate(ids, **settings)
    model.to("cuda:1")
    assert torch.cuda.current_device() == 0
    assert torch.equal(model.generate(ids.to("cuda:1"), **settings).cpu(), wanted.cpu())
