"""An event-driven model on a GPU: its kernels equal their reference, its tokens those of the processor."""

import copy
import importlib.util

import pytest
import torch
from spikingjelly.activation_based import functional

import neurons
from spiking_mamba import SpikingMambaConfig, SpikingMambaForCausalLM
from spiking_mamba.model.cuda import kernels, reference
from spiking_mamba.model.cuda.token import FusedToken, own_cache
from spiking_mamba.model.event_driven import event_driven

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="needs CuPy"),
]

INTEGER = {"class": "neurons.SILIFNode", "args": {"max_spike_count": 4}}
SHAPE = {"vocab_size": 500, "hidden_size": 256, "num_heads": 8, "head_dim": 64, "state_size": 128}
MLPS = {"layers_block_type": ["mlp", "mamba", "mamba"], "intermediate_size": 328}


def made_of(spec=INTEGER, weights="int8", states="float32", **fields):
    torch.manual_seed(0)
    own = SHAPE | {"n_groups": 1, "num_hidden_layers": 3, "threshold": 1.0 if spec is None else 0.25}
    own |= {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    model = SpikingMambaForCausalLM(SpikingMambaConfig(**own | fields, neuron=spec)).eval()
    return event_driven(model, weights, states)


def ids_of(rows, length, seed=0):
    return torch.randint(500, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spec", [INTEGER, None])
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("fields", [{}, {"n_groups": 2, "use_bias": True}, MLPS], ids=str)
def test_kernels_equal_their_reference(spec, weights, fields):
    made = made_of(spec, weights, **fields).cuda()
    for rows in (1, 3, 8):
        ids = ids_of(rows, 10).cuda()
        with torch.no_grad():
            first = made(ids[:, :6], use_cache=True).cache
            kept, found = [], []
            for functions in (kernels, reference):
                fused, cache = FusedToken(made, functions, keep=True), own_cache(first, torch.float32)
                found.append(torch.cat([fused(token, cache) for token in ids[:, 6:].split(1, 1)], 1))
                kept.append(fused.kept)
        ours, right = found
        # of a dense model, a last bit moves an activation over the edge between two integers
        assert (ours - right).norm() <= (0.02 if spec is None else 1e-4) * right.norm()
        layers = [getattr(b.mixer, n) for b in made.backbone.layers for n in ("in_proj", "out_proj")]
        for own, layer in zip(kept[0], layers, strict=True):
            assert own.inputs.count_nonzero() > 0
            if spec is not None:
                oracle = neurons.functional.event_driven_linear(own.inputs, layer.integer_weight())
                assert torch.equal(own.sums, oracle)


@pytest.mark.parametrize("states", ["float32", "bfloat16"])
def test_generate_is_captured_and_equals_the_processor(states):
    made = made_of(states=states)
    asked = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    on_gpu = copy.deepcopy(made).cuda()
    on_gpu.set_decoding("compiled")
    made.set_decoding("torch")
    for rows in (1, 2, 5, 8):
        ids = ids_of(rows, 9)
        wanted = made.generate(ids, attention_mask=torch.ones_like(ids), **asked)
        for _ in range(2):
            found = on_gpu.generate(ids.cuda(), attention_mask=torch.ones_like(ids).cuda(), **asked)
            assert torch.equal(found.cpu(), wanted)
        assert on_gpu._fuses
    assert len(on_gpu.graphs) == 4
    on_gpu.set_decoding("auto")
    ids = ids_of(12, 9)  # more than a launch takes
    many = on_gpu.generate(ids.cuda(), attention_mask=torch.ones_like(ids).cuda(), **asked)
    assert torch.equal(many.cpu(), made.generate(ids, attention_mask=torch.ones_like(ids), **asked))
    torch.manual_seed(0)
    sampled = on_gpu.generate(ids[:1].cuda(), max_new_tokens=5, do_sample=True)
    assert sampled.shape[1] <= 14


def test_streams_and_beams():
    made = made_of()
    on_gpu, ids = copy.deepcopy(made).cuda(), ids_of(2, 12)
    with torch.no_grad():
        wanted = made(ids).logits
        functional.set_step_mode(on_gpu, "s")
        for _ in range(2):
            found = torch.cat([on_gpu(token).logits for token in ids.cuda().split(1, 1)], 1)
            assert (found.cpu() - wanted).norm() <= 1e-4 * wanted.norm()
            functional.reset_net(on_gpu)
        functional.set_step_mode(on_gpu, "m")
    asked = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    made.set_decoding("torch")
    assert torch.equal(on_gpu.generate(ids.cuda(), **asked).cpu(), made.generate(ids, **asked))


def test_a_token_comes_out_the_same_every_time():
    made, ids = made_of(None).cuda(), ids_of(4, 8).cuda()
    with torch.no_grad():
        first = made(ids[:, :7], use_cache=True).cache
        found = [
            FusedToken(made)(ids[:, 7:], own_cache(first, torch.float32)) for _ in range(20)
        ]  # floats, whose order of summation would show
    assert all(torch.equal(each, found[0]) for each in found)


def test_overlapping_launches_change_nothing():
    from neurons.cupy import launcher

    if (reason := launcher.cannot_overlap(torch.device("cuda", 0))) is not None:
        pytest.skip(reason)
    ids, found = ids_of(2, 20).cuda(), []
    for overlaps in (False, True):
        with launcher.overlapping(overlaps):
            made = made_of().cuda()
            asked = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}
            found.append(made.generate(ids, attention_mask=torch.ones_like(ids), **asked))
    assert torch.equal(*found)
