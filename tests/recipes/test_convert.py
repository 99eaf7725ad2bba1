"""A Transformer becomes a Mamba2 with MLP blocks: weights, matching, its own text, packing, scores."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from torch.nn import functional as F

from spiking_mamba.common.errors import CheckpointError
from spiking_mamba.common.files import file_sha256
from spiking_mamba.evaluation.outcomes import main_outcomes
from spiking_mamba.model.checkpoint import load_dense
from spiking_mamba.model.converted import load_mixers, mixers_of
from spiking_mamba.model.llama import NotLlamaError
from spiking_mamba.model.source import load_source
from tests.helpers.converting import FOLDER, transformer, write_prepared


@pytest.fixture(scope="module")
def model():
    return transformer()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A model, and data as prepare.py leaves them."""
    folder = tmp_path_factory.mktemp("convert")
    model.save_pretrained(folder / "model")
    write_prepared(folder / "data")
    return folder


def test_the_source_answers_as_in_transformers(convert, model):
    source = convert.llama.Llama.from_transformers(model)
    ids = torch.randint(96, (2, 33), generator=torch.Generator().manual_seed(0))
    hidden = source.hidden_states(ids)
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
    torch.testing.assert_close(F.linear(hidden, source.head), output.logits, atol=1e-4, rtol=1e-4)
    for (x, _, _), theirs in zip(source.run(ids), output.hidden_states[1:-1], strict=False):
        torch.testing.assert_close(x, theirs, atol=1e-4, rtol=1e-4)


def test_attention_is_what_the_layer_is_asked_and_answers(convert, model):
    source = convert.llama.Llama.from_transformers(model)
    ids = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(1))
    seen = []
    hooks = [
        layer.self_attn.register_forward_hook(
            lambda _, args, kwargs, out: seen.append((kwargs["hidden_states"], out[0])), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    for (_, h, a), (theirs, answer) in zip(source.run(ids), seen, strict=True):
        torch.testing.assert_close(h, theirs, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(a, answer, atol=1e-4, rtol=1e-4)


def test_what_is_no_llama_is_refused(convert, model):
    with pytest.raises(NotLlamaError, match="not built like a Llama"):
        convert.llama.Llama.from_transformers(torch.nn.Linear(2, 2))
    model.config.hidden_act, kept = "gelu", model.config.hidden_act
    try:
        with pytest.raises(NotLlamaError, match="gelu"):
            convert.llama.Llama.from_transformers(model)
    finally:
        model.config.hidden_act = kept


def test_all_but_the_mixers_is_the_source_s(convert, model):
    """With attention put where the mixers are, the converted model is the Transformer."""
    source = convert.llama.Llama.from_transformers(model)
    student = convert.conversion.convert(source)
    assert student.config.layers_block_type == ["mamba", "mlp"] * 2
    ids = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(2))
    cos, sin = source.angles(torch.arange(20))
    for mixer, layer in zip(mixers_of(student), source.layers, strict=True):
        mixer.forward = lambda h, *_, layer=layer: convert.llama.attend(h, layer, source.shape, cos, sin)
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_mixer_starts_as_attention_without_softmax(convert, model):
    """Its first numbers worked out by hand from query, key, value: a sum over the past of C.B x, decaying."""
    source = convert.llama.Llama.from_transformers(model)
    shape, layer = source.shape, source.layers[0]
    student = convert.conversion.convert(source)
    mixer = mixers_of(student)[0]
    h = torch.randn(1, 5, 48, generator=torch.Generator().manual_seed(0))
    query, key, value = convert.llama.split_heads(F.linear(h, layer.qkv), shape)
    projected = F.linear(h, mixer.in_proj.weight, mixer.in_proj.bias)
    gate, rest = projected[..., :96], projected[..., 96:]
    torch.testing.assert_close(F.silu(gate), torch.ones_like(gate), atol=0.2, rtol=0)
    x, B, C = rest[..., :96], rest[..., 96:144], rest[..., 144:192]
    torch.testing.assert_close(B.view(1, 5, 3, 16), key.expand(1, 5, 3, 16))
    torch.testing.assert_close(C.view(1, 5, 3, 16), query)
    torch.testing.assert_close(x.view(1, 5, 3, 2, 16), value[:, :, :, None].expand(1, 5, 3, 2, 16))
    conv = torch.nn.Conv1d.forward(mixer.conv1d, rest[..., :-6].transpose(1, 2))[..., :5].transpose(1, 2)
    torch.testing.assert_close(conv, rest[..., :-6])
    y = torch.randn(1, 5, 3, 16)
    copies = y[:, :, :, None].expand(1, 5, 3, 2, 16).flatten(2)
    torch.testing.assert_close(
        mixer.out_proj(copies), F.linear(y.flatten(2), layer.out), atol=1e-5, rtol=1e-5
    )


def test_flat_parameters_are_the_modules_own(convert):
    torch.manual_seed(0)
    modules = [torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2)) for _ in range(3)]
    x = torch.randn(4, 3)
    before = [module(x) for module in modules]
    flat = convert.flat.FlatParameters(modules)
    for module, value in zip(modules, before, strict=True):
        torch.testing.assert_close(module(x), value)
    sum(float(k + 1) * module(x).square().sum() for k, module in enumerate(modules)).backward()
    norms = [math.sqrt(sum(float(p.grad.square().sum()) for p in module.parameters())) for module in modules]
    torch.testing.assert_close(flat.gradient_norms(), torch.tensor(norms))
    flat.clip_gradients(0.5, each=True)
    torch.testing.assert_close(flat.gradient_norms(), torch.full((3,), 0.5))
    with torch.no_grad():
        flat.matrices.zero_()
        flat.vectors.zero_()
    assert all(not p.any() for module in modules for p in module.parameters())
    with pytest.raises(ValueError, match="not alike"):
        convert.flat.FlatParameters([torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)])


def test_layers_learn_without_position_0(convert, model):
    source = convert.llama.Llama.from_transformers(model)
    student = convert.conversion.convert(source)
    mixers = mixers_of(student)
    flat = convert.flat.FlatParameters(mixers)
    ids = torch.randint(96, (2, 16), generator=torch.Generator().manual_seed(3))
    errors = convert.matching.LayerMatching(source, mixers, compiles=False)(ids)
    for mixer, (_, h, a), error in zip(mixers, source.run(ids), errors, strict=True):
        out = mixer(h)
        by_hand = (out - a)[:, 1:].square().sum() / a[:, 1:].square().sum()
        torch.testing.assert_close(error, by_hand)
        wanted = torch.autograd.grad(by_hand, mixer.out_proj.weight)[0]
        torch.testing.assert_close(mixer.out_proj.weight.grad, wanted)
    assert flat.matrices.grad.any()


def test_logits_learn_without_position_0(convert, model):
    source = convert.llama.Llama.from_transformers(model)
    student = convert.conversion.convert(source).requires_grad_(False).train()
    mixers = mixers_of(student)
    for mixer in mixers:
        mixer.requires_grad_(True)
    convert.flat.FlatParameters(mixers)
    ids = torch.randint(96, (4, 16), generator=torch.Generator().manual_seed(4))
    loss = convert.matching.LogitMatching(source, student, compiles=False, piece=2)(ids)
    log_p, log_q = student(ids).logits.log_softmax(-1), model(ids).logits.log_softmax(-1).detach()
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)[:, 1:].mean()
    torch.testing.assert_close(loss[0], kl.detach(), atol=1e-5, rtol=1e-4)
    for mixer in mixers:
        wanted = torch.autograd.grad(kl, mixer.out_proj.weight, retain_graph=True)[0]
        torch.testing.assert_close(mixer.out_proj.weight.grad, wanted, atol=1e-6, rtol=1e-3)


def test_a_mixture_is_a_function_of_the_step(convert):
    tokens = np.arange(40000, 40000 + 77, dtype=np.uint16)  # above what int16 holds
    stream = convert.tokens.Stream(tokens, 8, seed=1, device="cpu")
    assert stream.count == 11
    first = stream.take(0, 11)
    assert (first[:, 0] == 0).all()
    assert sorted(first[:, 1:].flatten().tolist()) == tokens.tolist()
    assert not torch.equal(first, stream.take(11, 11))  # another order
    torch.testing.assert_close(first, stream.take(0, 11))
    both = [convert.tokens.Mixture([(stream, 2)], rank, 2)(3) for rank in range(2)]
    torch.testing.assert_close(torch.cat(both), stream.take(12, 4))


def test_written_tokens_are_the_model_s(convert, model):
    """Step by step, with a cache, as the whole forward pass says: greedily, as min_p = 1 leaves one token."""
    source = convert.llama.Llama.from_transformers(model)
    openings = convert.decode.Openings(
        torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([3, 2]), torch.zeros(2, 4, dtype=torch.long)
    )
    writer = convert.decode.Writer(
        source, 2, 24, openings, end=0, ends_turn=2, min_p=1.0, every=7, compiles=False
    )
    tokens, starts = writer.write(torch.tensor([[0, 1, 1, 1], [1, 0, 0, 0]]))
    with torch.no_grad():
        best = F.linear(source.hidden_states(tokens), source.head).argmax(-1)
    assert tokens[:, 0].tolist() == [0, 0]
    assert tokens[0, 1:4].tolist() == [5, 6, 7]
    assert tokens[1, 1:3].tolist() == [8, 9]
    for row in range(2):
        place, given, last = 0, [3, 2][row], -1
        for k in range(23):
            if starts[row, k]:
                place, given = 0, given if k == 0 else 10**9
            if given == 10**9:  # another opening: covered by the next test
                break
            if place >= given and last != 2:
                assert tokens[row, k + 1] == best[row, k]
            last = int(tokens[row, k + 1]) if place >= given else -1
            place += 1


def test_an_ended_document_is_followed_by_the_next_opening(convert, model, monkeypatch):
    source = convert.llama.Llama.from_transformers(model)
    openings = convert.decode.Openings(
        torch.tensor([[5, 2, 7], [8, 9, 0]]), torch.tensor([3, 2]), torch.zeros(1, 3, dtype=torch.long)
    )
    writer = convert.decode.Writer(source, 1, 14, openings, end=0, ends_turn=2, compiles=False)
    sampled = iter([0, 50, 0, 2, 60, 51, 2, 51, 52, 53, 54, 55, 56])  # one is drawn for every position
    writer.draw = lambda *_: torch.tensor([next(sampled)])
    tokens, starts = writer.write(torch.tensor([[0, 1, 0]]))
    # the opening's own 2 ends nothing; a drawn 2 is followed by 0, a 0 by the next opening
    assert tokens[0].tolist() == [0, 5, 2, 7, 2, 0, 8, 9, 51, 52, 53, 54, 55, 56][:14]
    assert starts[0].nonzero()[:, 0].tolist() == [0, 5]


def test_a_draw_follows_the_distribution(convert):
    torch.manual_seed(0)
    logits = torch.tensor([[2.0, 1.0, 0.0, -4.0]]).expand(40000, 4)
    noise = torch.empty(40000, 4).exponential_()
    drawn = convert.decode.draw(logits, noise, temperature=0.8, min_p=0.05)
    p = (torch.tensor([2.0, 1.0, 0.0]) / 0.8).softmax(0)  # the last one is less than 0.05 times as probable
    counts = drawn.bincount(minlength=4) / 40000
    torch.testing.assert_close(counts[:3], p, atol=0.01, rtol=0)
    assert counts[3] == 0


def test_loops_copies_and_what_is_evaluated_go(convert):
    random = np.random.default_rng(0)
    good, other, known = (random.integers(3, 5000, 60) for _ in range(3))
    loop = np.tile(random.integers(3, 5000, 5), 12)
    evaluated = convert.filters.Evaluated(
        np.concatenate([known[:20], [0], random.integers(3, 5000, 30)]).astype(np.uint16), 13, 0, "cpu"
    )
    spoilt = other.copy()
    spoilt[30:43] = known[5:18]  # thirteen in a row
    near = other.copy()
    near[30:42] = known[5:17]  # twelve
    rows = torch.from_numpy(
        np.stack([np.concatenate([[0], row]) for row in (good, loop, spoilt, near, good)])
    )
    starts = torch.zeros_like(rows, dtype=torch.bool)
    starts[:, 0] = True
    starts[0, 50] = True  # a document of 11 tokens
    keep = convert.filters.Filter(evaluated, shortest=32)
    kept = keep(rows, starts)
    wanted = [rows[0, :50], rows[3], rows[4]]
    assert kept.tolist() == torch.cat(wanted).tolist()
    assert {name: value for name, value in keep.counts.items() if name.endswith("documents") and value} == {
        "seen documents": 6, "short documents": 1, "looping documents": 1, "evaluated documents": 1,
        "kept documents": 3,
    }  # fmt: skip
    starts[0, 50] = False
    keep(rows[3:4], starts[3:4])
    assert keep.counts["repeated documents"] == 1


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_mixers_come_back(convert, model, tmp_path, bits):
    source = convert.llama.Llama.from_transformers(model)
    student = convert.conversion.convert(source)
    for mixer in mixers_of(student):
        for parameter in mixer.parameters():
            torch.nn.init.normal_(parameter)
    paths = convert.packing.pack_mixers(student, tmp_path, "a source", bits, group=16, megabytes=0.02)
    assert all(path.stat().st_size < 0.03 * 2**20 for path in paths)
    assert len(paths) > 2
    other = convert.conversion.convert(source)
    index = load_mixers(other, tmp_path)
    assert index["sha256"] == {path.name: file_sha256(path) for path in paths[1:]}
    mixers = [mixers_of(m) for m in (student, other)]
    for one, two in zip(*mixers, strict=True):
        for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
            if p.ndim != 2:
                assert torch.equal(p, q), name
                continue
            parts, most = p.detach().unflatten(1, (-1, 16)), 2 ** (bits - 1) - 1
            step = parts.abs().amax(-1, keepdim=True) / most
            plain = ((parts / step).round() * step - parts).square().sum(-1)
            error = (q.detach().unflatten(1, (-1, 16)) - parts).square().sum(-1)
            assert error.sum() <= plain.sum() * 1.01, name  # scales are float16's: a little off at 8 bits
            assert (error.sqrt() <= step[..., 0] * 2.02).all(), name  # half a step each, of sixteen
    with pytest.raises(CheckpointError, match="holds no packed mixers"):
        load_mixers(other, tmp_path / "none")


def test_modules_see_rounded_matrices_and_gradients_pass_straight_through(convert):
    def layers():
        torch.manual_seed(0)
        return [torch.nn.Sequential(torch.nn.Linear(32, 5), torch.nn.Linear(5, 3)) for _ in range(2)]

    with pytest.raises(ValueError, match="Groups of 32 do not divide the 5 inputs of 1"):
        convert.flat.FlatParameters(layers(), bits=4, group=32)
    modules, plain = ([layer[:1] for layer in layers()] for _ in range(2))
    flat = convert.flat.FlatParameters(modules, bits=4, group=16)
    x = torch.randn(7, 32)
    for module, other in zip(modules, plain, strict=True):
        found, scale = convert.packing.integers(other[0].weight, 4, 16)
        wanted = found.float() * scale.repeat_interleave(16, 1)
        assert torch.equal(module[0].weight, wanted)
        assert 0 < (wanted - other[0].weight).abs().max() < 0.1
        other[0].weight.data = wanted
        module(x).square().sum().backward()
        other(x).square().sum().backward()
        assert torch.equal(module[0].weight.grad, other[0].weight.grad)
    # a step of the trained matrices shows once they are rounded again
    before = modules[0][0].weight.clone()
    with torch.no_grad():
        flat.matrices -= flat.matrices.grad
    assert torch.equal(modules[0][0].weight, before)
    flat.round()
    assert not torch.equal(modules[0][0].weight, before)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_is_rounded_is_rounded_to_itself(convert, bits):
    weight = torch.randn(50, 64) * torch.logspace(-6, 3, 50)[:, None]
    once = convert.rounding.rounded(weight.view(-1, 32), bits)
    assert torch.equal(convert.rounding.rounded(once, bits), once)
    scales = convert.rounding.scales_of(weight, bits, 32)
    assert torch.equal(scales.half().float(), scales)


def test_errors_fed_back_help_what_the_layer_says(convert):
    torch.manual_seed(0)
    x = torch.randn(2000, 24) @ torch.randn(24, 96) + 0.1 * torch.randn(2000, 96)
    weight = torch.randn(40, 96)
    errors = []
    for moment in (None, x.T @ x / len(x)):
        found, scale = convert.packing.integers(weight, 4, 32, moment)
        back = found.float() * scale.repeat_interleave(32, 1)
        errors.append(float(((back - weight) @ x.T).norm()))
    assert errors[1] < 0.5 * errors[0]


def test_second_moments_are_of_what_projections_are_given(convert, model):
    student = convert.conversion.convert(convert.llama.Llama.from_transformers(model))
    ids = torch.randint(3, 96, (3, 10), generator=torch.Generator().manual_seed(0))
    moments = convert.packing.second_moments(student, ids, rows=2)
    first = student.backbone.layers[0]
    with torch.no_grad():
        x = first.norm(student.backbone.embeddings(ids))[:, 1:].flatten(0, 1)
    torch.testing.assert_close(moments["0.in_proj"], x.T @ x / len(x), atol=1e-5, rtol=1e-4)
    mixers = mixers_of(student)
    assert set(moments) == {f"{k}.{n}" for k in range(len(mixers)) for n in ("in_proj", "out_proj")}
    assert not any(m._forward_pre_hooks for m in student.modules())


def make_settings(convert, folder, **changed):
    defaults = {
        "output": str(folder / "layers"),
        "stage": "layers",
        "source": str(folder / "model"),
        "own_text": [],
        "package_text": [str(folder / "data" / "package_text.bin")],
        "rows": 2,
        "piece": 1,
        "length": 32,
        "steps": 12,
        "log_every": 3,
        "warmup": 2,
        "compiles": False,
    }
    return convert.train.TrainSettings(**defaults | changed)


def run(convert, settings):
    Path(settings.output).mkdir(parents=True, exist_ok=True)
    stage = convert.train.Stage(settings)
    stage.run()
    return stage


@pytest.mark.parametrize(("name", "bits"), [("layers", 0), ("logits", 0), ("logits", 4)])
def test_a_stage_learns_and_goes_on_as_if_never_stopped(convert, folder, tmp_path, monkeypatch, name, bits):
    def settings(convert, folder, **changed):
        return make_settings(convert, folder, stage=name, bits=bits, group=16, **changed)

    whole = run(convert, settings(convert, folder, output=str(tmp_path / "whole")))
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["step"] == 12
    halves = settings(convert, folder, output=str(tmp_path / "halves"))
    monkeypatch.setattr(convert.train.Stage, "_over", lambda self, *_: self.progress.step == 6)
    assert run(convert, halves).progress.step == 6
    monkeypatch.undo()
    stage = run(convert, halves)
    assert torch.equal(stage.flat.matrices, whole.flat.matrices)
    assert torch.equal(stage.flat.vectors, whole.flat.vectors)
    with pytest.raises(convert.train.RunError, match="other settings of rows"):
        convert.train.Stage(settings(convert, folder, output=str(tmp_path / "halves"), rows=4))
    if not bits:
        return
    # what was learned in few bits is packed as it is
    source = convert.llama.Llama.from_transformers(load_source(str(folder / "model")))
    models = [convert.conversion.convert(source) for _ in range(2)]
    convert.flat.load_state(mixers_of(models[0]), tmp_path / "whole" / "state.pt")
    convert.packing.pack_mixers(models[0], tmp_path / "packed", "a source", bits, group=16)
    load_mixers(models[1], tmp_path / "packed")
    for model in models:
        for mixer, trained in zip(mixers_of(model), whole.mixers, strict=True):
            for one, two in zip(mixer.parameters(), trained.parameters(), strict=True):
                assert torch.equal(one, two)


def test_text_is_written_again_from_its_seeds(convert, folder, tmp_path):
    plain = {"source": str(folder / "model"), "data": str(folder / "data"), "rows": 8, "length": 64}
    plain |= {"compiles": False, "every": 16, "parts": 2}
    device = torch.device("cpu")
    made = [
        convert.write_text.WriteSettings(output=str(tmp_path / f"{name}.bin"), **plain | changed)
        for name, changed in (("one", {}), ("two", {}), ("late", {"first_part": 1, "parts": 1}))
    ]
    facts = [convert.write_text.main_loop(each, 0, device) for each in made]
    one, two, late = (np.fromfile(tmp_path / f"{n}-0.bin", np.uint16) for n in ("one", "two", "late"))
    assert np.array_equal(one, two)
    assert np.array_equal(one[-len(late) :], late)
    assert facts[0]["counts"]["kept tokens"] == len(one)
    assert facts[0]["counts"]["seen tokens"] == 2 * 8 * 64


def test_scores_by_hand(convert, folder, model):
    source = convert.llama.Llama.from_transformers(model)
    data = np.load(folder / "data" / "evaluated.npz")
    scored = convert.score.Scored(source, None)
    found = convert.score.tasks(convert.score.outcomes(scored, data, 0, 64))
    table, tokens = data["requests"], torch.from_numpy(data["tokens"].astype(np.int64))
    sums, start = [], 0
    for _, _, _, _, length, end, _ in table.tolist():
        ids = F.pad(tokens[start : start + length], (1, 0))
        with torch.no_grad():
            log_p = model(ids[None]).logits[0, :-1].log_softmax(-1)
        own = log_p[-end:].gather(1, ids[-end:, None])
        sums.append((float(own.sum()), bool((log_p[-end:].argmax(-1) == ids[-end:]).all())))
        start += length
    hits = [(sums[2 * k][0] < sums[2 * k + 1][0]) == k % 2 for k in range(6)]
    assert found["piqa"]["acc"] == pytest.approx(np.mean(hits), abs=1e-4)
    assert found["lambada_openai"]["acc"] == pytest.approx(np.mean([s[1] for s in sums[12:]]), abs=1e-4)
    rest = convert.score.passages(scored, data, 4, 256, length=64)
    assert rest["kl_web"] == 0
    assert rest["agreement_web"] == 1
    ids = F.pad(torch.from_numpy(data["openwebtext-passages"][: 63 * 4].astype(np.int64)).view(4, 63), (1, 0))
    with torch.no_grad():
        log_p = model(ids).logits[:, 1:-1].log_softmax(-1)
    nll = -log_p.gather(2, ids[:, 2:, None]).mean()
    assert rest["perplexity_web"] == pytest.approx(math.exp(nll), rel=1e-3)


def test_the_recipe_runs_from_its_commands(convert, folder, tmp_path, monkeypatch, capsys):
    """Text, both stages, packing and scoring, then the model loads in one line and answers."""
    source, data = str(folder / "model"), folder / "data"

    def command(name, config, **changed):
        arguments = [f"{key}={value}" for key, value in {"source": source, **changed}.items()]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", str(FOLDER / config), *arguments])
        getattr(convert, name).main()

    run = tmp_path / "run"
    plain = {"compiles": "false", "length": 64, "rows": 8}
    command("write_text", "write_text.yaml", data=data, output=run / "own.bin", parts=2, every=16, **plain)
    texts = {"own_text": f"[{run}/own-0.bin]", "package_text": f"[{data}/package_text.bin]"}
    train = plain | texts | {"steps": 6, "warmup": 2, "piece": 4, "log_every": 2}
    command("train", "layers.yaml", output=run / "layers", **train)
    command("pack", "pack.yaml", state=run / "layers/state.pt", output=run / "packed")
    few = {"bits": 4, "group": 16}
    command("train", "logits.yaml", output=run / "logits", start=run / "packed", **train | few)
    command("pack", "pack.yaml", state=run / "logits/state.pt", output=run / "model", **few)
    scores = {"data": data, "log": run / "scores.jsonl", "limit": 0, "passages": 2}
    command("score", "score.yaml", state=run / "logits/state.pt", items=run / "state.npz", **scores)
    command("score", "score.yaml", mixers=run / "model", items=run / "packed.npz", **scores)
    state, packed = (json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines())
    assert packed["tasks"] == state["tasks"]
    assert packed["kl_web"] == state["kl_web"] > 0
    assert state["scored"]["tokens"] == 6 * 8 * 64
    assert set(packed["scored"]["sha256"]) == {"mixers-00.safetensors"}
    items = main_outcomes(run / "packed.npz")
    assert {name: len(found) for name, found in items.items()} == {"piqa": 6, "lambada_openai": 5}
    assert convert.model_card.origin(packed)["date"] == packed["provenance"]["date"][:10]
    assert items["piqa"].mean() == pytest.approx(packed["tasks"]["piqa"]["acc"], abs=1e-4)
    model = load_dense(run / "model")
    ids = torch.randint(3, 96, (1, 9))
    assert model.generate(ids, max_new_tokens=4, min_new_tokens=4).shape == (1, 13)
    with pytest.raises(SystemExit, match="no folder"):
        command("score", "score.yaml", mixers=run / "model", **scores | {"log": run / "none/scores.jsonl"})
    capsys.readouterr()


def test_a_card_says_where_its_scores_come_from(convert):
    about = {"date": "2026-01-02T03:04:05+00:00", "commit": "0123456789abcdef", "hardware": {"gpu": None}}
    about["hardware"]["cpu"] = "a processor"
    wanted = {"date": "2026-01-02", "commit": "0123456", "device": "a processor"}
    assert convert.model_card.origin({"provenance": about}) == wanted
    assert (
        convert.model_card.origin({"scored": "source"} | wanted) == wanted
    )  # of before there was a provenance


CARD = FOLDER.parents[1] / "weights/smollm2-mamba2/README.md"


def test_the_shipped_card_is_of_its_records(convert):
    """Every number of the card that can be had without the source's weights, worked out anew."""
    text = CARD.read_text()
    records = FOLDER.parents[1] / "docs/results/smollm2"
    sides = [np.load(records / f"{name}.npz") for name in ("source", "packed")]
    means = {}
    for name, metric, chance in (
        ("arc_easy", "acc", 0.25), ("piqa", "acc", 0.5), ("hellaswag", "acc_norm", 0.25),
        ("sciq", "acc", 0.25), ("lambada_openai", "acc", 0), ("arc_challenge", "acc_norm", 0.25),
        ("openbookqa", "acc_norm", 0.25),
        ("boolq", "acc", 0.5), ("winogrande", "acc", 0.5), ("copa", "acc", 0.5),
    ):  # fmt: skip
        count = int(sides[0][f"{name}/items"])
        means[name] = [np.unpackbits(side[f"{name}/{metric}"])[:count].mean() - chance for side in sides]
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} "))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1:3] == [metric, f"{count:,}"]
        assert [cell.split(" ± ")[0] for cell in cells[4:6]] == [
            f"{100 * (mean + chance):.1f}" for mean in means[name]
        ]
        difference = 100 * (means[name][1] - means[name][0])
        assert float(cells[6].split()[0]) == pytest.approx(difference, abs=0.0501)
    theirs, ours = (sum(means[n][k] for n in ("arc_easy", "piqa", "hellaswag", "sciq")) for k in range(2))
    assert f"**{100 * ours / theirs:.1f}% (" in text
    theirs, ours = means["lambada_openai"]
    assert f"{100 * ours / theirs:.1f}% (" in text
    for sets, words in (
        ([name for name in means if name != "lambada_openai"], "9 sets that have one the share is"),
        (list(means), "its chance taken as 0,"),
    ):
        theirs, ours = (sum(means[name][k] for name in sets) for k in range(2))
        assert float(text.split(words)[1].split("%")[0]) == pytest.approx(100 * ours / theirs, abs=0.1)
    theirs, ours = means["hellaswag"]
    assert f"Kept least of these sets: hellaswag ({100 * ours / theirs:.1f}%)" in text
    attention = 30 * (2 * 576 * 576 + 2 * 576 * 192) / 1e6  # by the configuration of SmolLM2-135M
    assert f"{attention:.1f} million parameters, are replaced" in text
    index = json.loads(CARD.with_name("mixers.json").read_text())
    assert index["sha256"] == {name: file_sha256(CARD.with_name(name)) for name in index["files"]}
    last = [json.loads(line) for line in CARD.with_name("log.jsonl").read_text().splitlines()][-1]
    assert [last[key] for key in ("step", "tokens")] == [index["progress"][key] for key in ("step", "tokens")]
    written = [json.loads(line) for line in (records / "text.jsonl").read_text().splitlines()]
    own = sum(each["counts"]["kept tokens"] for each in written) / 1e6
    assert f"The text: {own:.0f} million tokens" in text
    assert all(path.stat().st_size <= 16 * 2**20 for path in CARD.parent.glob("*"))
    assert sum(path.stat().st_size for path in CARD.parent.glob("*.safetensors")) <= 48e6
    for question in convert.model_card.parse_settings(
        convert.model_card.CardSettings, [str(FOLDER / "model_card.yaml")]
    ).questions:
        assert f"**{question}**" in text


def test_the_shipped_card_s_tables_and_intervals_are_of_its_records(convert, monkeypatch):
    """As the recipe words them: what is kept, the other texts, stages, tokens, and GPU-minutes."""
    monkeypatch.chdir(FOLDER.parents[1])
    card, text = convert.model_card, CARD.read_text()
    settings = card.parse_settings(card.CardSettings, [str(FOLDER / "model_card.yaml")])
    records = card.Records(settings)
    known = card.text_fields(records, settings.package_tokens)
    known |= card.evaluation_fields(records) | card.ability_fields(records, settings.ability)
    for name in ("ability", "lambada", "with_chance", "with_all", "weakest", "scores", "passages"):
        assert known[name] in text, name
    assert card.stage_table(records) in text
    assert ModelCard(text).data.to_dict() == card.head(records, "smollm2-mamba2").to_dict()
    assert f"\n{records.gpu_minutes():.0f} GPU-minutes of H200" in text
    words = " ".join(text.split())
    for line in (
        "its {own_last:.0f} million own tokens {own_passes:.1f} times and packages' {package_passes:.1f}",
        "of {seen:.0f} million, {looping:.0f}% left out as loops and {evaluated:.2f}% for sharing {overlap}",
        "(temperature {temperature}, min-p {min_p}; of",
        "Evaluated {date} on one {device} at commit {commit}:",
    ):
        assert line.format(**known) in words
