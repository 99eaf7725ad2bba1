"""The scan as an operator for torch.compile, with the torch functions standing in for Triton's kernels."""

import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from spiking_mamba.model import scan as ssd
from tests.helpers.tiny import INTEGER, tiny_model, tokens


def _forward(x, dt, A, B, C, chunk_size, **options):
    assert options.pop("dt_softplus")
    return ssd.scan_torch(x, dt, A, B, C, chunk_size, document=options.pop("seq_idx"), **options)


def _chunk_scan(*inputs, return_final_states, **options):
    y, last = _forward(*inputs, **options)
    return (y, last) if return_final_states else y


def _backward(grad, x, dt, A, B, C, y, chunk_size, D, dt_bias, **options):
    def differentiate():
        inputs = [t.detach().requires_grad_() for t in (x, dt, A, B, C, D, dt_bias)]
        *scan, d, bias = inputs
        out, _ = _forward(*scan, chunk_size, D=d, dt_bias=bias, **options)
        return torch.autograd.grad(out, inputs, grad)

    with ThreadPoolExecutor(1) as thread:  # inside an operator autograd is switched off for this thread
        dx, ddt, dA, dB, dC, dD, ddt_bias = thread.submit(differentiate).result()
    return dx, ddt, dA, dB, dC, dD, None, ddt_bias, None


@pytest.fixture
def kernels(monkeypatch):
    """Count the calls of stand-ins for mamba-ssm's two functions."""
    calls = {"forward": 0, "backward": 0}

    def counted(name, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    stand_ins = types.SimpleNamespace(
        chunk_scan=_chunk_scan,
        forward=counted("forward", _forward),
        backward=counted("backward", _backward),
    )
    monkeypatch.setattr(ssd, "_triton_kernels", lambda: stand_ins)
    monkeypatch.setattr(ssd, "_on_triton", lambda x: True)
    return calls


def _inputs(length=20):
    torch.manual_seed(0)
    H, P, N = 2, 8, 4
    tensors = [torch.randn(2, length, H, P), torch.randn(2, length, H), -torch.rand(H) - 0.5]
    tensors += [torch.randn(2, length, 1, N), torch.randn(2, length, 1, N), torch.randn(H), torch.randn(H)]
    return [t.requires_grad_() for t in tensors]


@pytest.mark.parametrize("triton", [True, False])
def test_the_operator_is_one(triton, request):
    if triton:
        request.getfixturevalue("kernels")
    document = torch.tensor([0] * 5 + [1] * 9 + [2] * 6, dtype=torch.int32).expand(2, -1).contiguous()
    for which in (None, document):
        arguments = (*_inputs(), which, 8, 0.0, float("inf"))
        torch.library.opcheck(ssd._scan_operator, arguments)


def test_a_compiled_block_equals_an_uncompiled_one(kernels):
    torch.compiler.reset()
    ids = tokens(2, 24)
    for fields in ({}, {"neuron": INTEGER}, {"neuron": INTEGER, "threshold": 0.5, "learn_threshold": True}):
        model = tiny_model(**fields).train()
        results = []
        for compiles in (False, True):
            model.compile_blocks(compiles)
            before = dict(kernels)
            loss = model(ids, labels=ids).loss
            parameters = dict(model.named_parameters())
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            results.append((loss.detach(), gradients))
            layers = model.config.num_hidden_layers if compiles else 0
            assert {name: kernels[name] - before[name] for name in kernels} == {
                "forward": layers,
                "backward": layers,
            }
        (loss, gradients), (compiled_loss, compiled_gradients) = results
        torch.testing.assert_close(compiled_loss, loss)
        for name, one, other in zip(parameters, gradients, compiled_gradients, strict=True):
            assert (one - other).abs().max() <= 1e-4 * one.abs().max(), name


def test_blocks_share_what_was_compiled():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_model(neuron=INTEGER, num_hidden_layers=4).train()
    model.compile_blocks()
    for seed in (0, 1):
        model(tokens(2, 24, seed)).logits.sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_lengths_share_what_was_compiled():
    """A second length took minutes."""
    torch.compiler.reset()
    model = tiny_model(neuron=INTEGER).train()
    parameters = list(model.parameters())
    for length in (16, 9, 40, 70):
        ids, found = tokens(2, length), []
        for compiles in (False, True):
            model.compile_blocks(compiles)
            loss = model(ids, labels=ids).loss
            found.append([loss.detach(), *torch.autograd.grad(loss, parameters)])
        for one, other in zip(*found, strict=True):
            assert (one - other).abs().max() <= 1e-4 * one.abs().max()
        if length == 9:  # from now on for any length
            torch._dynamo.utils.counters.clear()
    assert not torch._dynamo.utils.counters["stats"]


def test_the_annealing_of_sgc_compiles_nothing_anew():
    torch.compiler.reset()
    ids = tokens(2, 24)
    model = tiny_model(neuron=INTEGER, sgc={"mode": "blend"}).train()
    for lam in (1.0, 0.5, 0.25):
        model.set_sgc_lambda(lam)
        model.compile_blocks(False)
        expected = model(ids).logits
        model.compile_blocks()
        if lam == 0.5:
            torch._dynamo.utils.counters.clear()
        torch.testing.assert_close(model(ids).logits, expected)
    assert not torch._dynamo.utils.counters["stats"]


def test_who_counts_spikes_sees_all_of_them():
    from spiking_mamba.spikes.counting import count_spikes

    model = tiny_model(neuron=INTEGER).train()
    counts = []
    for compiles in (False, True):
        model.compile_blocks(compiles)
        with count_spikes(model) as found, torch.no_grad():
            model(tokens(2, 24))
        counts.append(found.accumulations)
    assert counts[0] == counts[1] > 0


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_a_watched_block_is_computed_again_as_it_was(monkeypatch):
    """By gradient checkpointing, which asks for as many tensors as before when nobody watches any more."""
    from spiking_mamba.model import block
    from spiking_mamba.spikes.counting import count_spikes

    compiled = []

    def run(*args):
        compiled.append(args[0].layer_idx)
        return block.SpikingMambaBlock._run(*args)

    monkeypatch.setattr(block, "_compiled_block", lambda: run)
    model = tiny_model(neuron=INTEGER).train()
    model.compile_blocks()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with count_spikes(model, histogram=False):
        loss = model(tokens(2, 24)).logits.sum()
    loss.backward()
    assert compiled == []
    model(tokens(2, 24)).logits.sum().backward()
    layers = list(range(model.config.num_hidden_layers))
    assert compiled == [*layers, *reversed(layers)]


def test_compiled_blocks_decode():
    model = tiny_model(neuron=INTEGER)
    expected = model.generate(tokens(1, 5), max_new_tokens=6, do_sample=False)
    model.compile_blocks()
    assert torch.equal(model.generate(tokens(1, 5), max_new_tokens=6, do_sample=False), expected)


def test_the_compiled_convolution_equals_torchs(monkeypatch):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 9, 5), torch.randn(5, 4), torch.randn(5)
    for length in (9, 2):
        expected = ssd.causal_conv1d(x[:, :length], weight, bias, "silu")
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            torch.testing.assert_close(ssd.causal_conv1d(x[:, :length], weight, bias, "silu"), expected)
