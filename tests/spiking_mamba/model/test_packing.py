"""Padding anywhere, and documents in one row: every sequence as if it were alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spiking_mamba.model import scan
from spiking_mamba.model.packing import documents_of
from tests.helpers.tiny import INTEGER, LEAKY, tiny_model, tokens

MODELS = {
    "dense": {},
    "biased": {"use_bias": True, "time_step_limit": (0.01, 1.0)},
    "token": {"neuron": INTEGER, "threshold": 0.5},
    "sequence": {"neuron": LEAKY, "membrane": "sequence", "threshold": 0.5},
    "mlp": {
        "neuron": LEAKY,
        "membrane": "sequence",
        "num_hidden_layers": 3,
        "layers_block_type": ["mlp", "mamba", "mlp"],
        "intermediate_size": 24,
    },
}
KINDS = pytest.mark.parametrize("kind", MODELS)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


def model_of(kind):
    return tiny_model(**MODELS[kind] | {"chunk_size": 16})


PATTERNS = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0]],
    "inside": [[1, 1, 0, 0, 1, 1, 0, 1], [1, 0, 1, 1, 0, 0, 1, 1]],
    "an empty row": [[0] * 8, [1, 1, 1, 0, 1, 1, 1, 1]],
}


@KINDS
@pytest.mark.parametrize("pattern", PATTERNS)
def test_padding_moves_nothing(kind, pattern):
    """Prompts with padding, then a second padded turn, then single tokens, all through one cache."""
    model, ids, mask = model_of(kind), tokens(2, 8), torch.tensor(PATTERNS[pattern])
    second, second_mask = tokens(2, 8, seed=1), torch.tensor(PATTERNS[pattern][::-1])
    last = tokens(2, 3, seed=2)
    with torch.no_grad():
        plain = model(ids, attention_mask=mask, use_cache=False).logits
        first = model(ids, attention_mask=mask, use_cache=True)
        turn = model(second, attention_mask=torch.cat([mask, second_mask], 1), cache=first.cache)
        ends = [model(token, cache=turn.cache).logits for token in last.split(1, dim=1)]
        for row in range(2):
            keep, keep_second = mask[row].bool(), second_mask[row].bool()
            own = torch.cat([ids[row, keep], second[row, keep_second], last[row]])[None]
            alone = model(own, use_cache=False).logits[0]
            found = torch.cat(
                [first.logits[row, keep], turn.logits[row, keep_second], *(e[row] for e in ends)]
            )
            close(found, alone)
            close(plain[row, keep], alone[: int(keep.sum())])


def test_a_single_token_may_be_padding():
    model, ids = model_of("sequence"), tokens(2, 6)
    with torch.no_grad():
        cache = model(ids, use_cache=True).cache
        mask = torch.tensor([[1], [0]])
        model(tokens(2, 1, seed=3), attention_mask=mask, cache=cache)
        found = model(tokens(2, 1, seed=4), cache=cache).logits[1]
        own = torch.cat([ids[1:], tokens(2, 1, seed=4)[1:]], 1)
        close(found, model(own, use_cache=False).logits[0, -1:])


@pytest.mark.parametrize("side", PATTERNS)
@pytest.mark.parametrize("how", ["positional", "input_ids", "inputs_embeds", "beams"])
def test_generate_from_padded_prompts(side, how):
    model, ids = model_of("token"), tokens(2, 8) + 0
    ids[ids == 0] = 1
    mask = torch.tensor(PATTERNS[side])
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    if how == "beams":
        settings["num_beams"] = 3
    named = {"input_ids": ids}
    if how == "inputs_embeds":
        named = {"inputs_embeds": model.get_input_embeddings()(ids)}
    with torch.no_grad():
        if how == "positional":
            text = model.generate(ids, attention_mask=mask, **settings)
        else:
            text = model.generate(**named, attention_mask=mask, **settings)
    for row in range(2):
        own = ids[row, mask[row].bool()][None]
        if not own.numel():
            continue
        alone = model.generate(own, attention_mask=torch.ones_like(own), **settings)
        assert torch.equal(text[row, -5:], alone[0, -5:])


def test_a_second_turn_goes_on_behind_padding():
    model, ids = model_of("token"), tokens(2, 8) + 0
    ids[ids == 0] = 1
    mask = torch.tensor(PATTERNS["right"])
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        cache = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True).cache
        text = model.generate(ids[:, 4:], attention_mask=mask, cache=cache, **settings)
    for row in range(2):
        own = ids[row, mask[row].bool()][None]
        alone = model.generate(own, attention_mask=torch.ones_like(own), **settings)
        assert torch.equal(text[row, -5:], alone[0, -5:])


def test_short_masks_are_refused():
    with pytest.raises(ValueError, match="attention_mask must be"):
        model_of("dense")(tokens(2, 8), attention_mask=torch.ones(2, 7))


# --- documents ---

LENGTHS = [5, 1, 17, 9]


def packed(seed=0):
    documents = [tokens(1, length, seed=seed + i) for i, length in enumerate(LENGTHS)]
    return documents, torch.cat(documents, 1)


def said(how):
    numbers = torch.cat([torch.full((1, length), 7 * i) for i, length in enumerate(LENGTHS)], 1)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    positions = torch.cat([torch.arange(length)[None] for length in LENGTHS], 1)
    flash = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 17, "max_length_k": 17}
    return {"seq_idx": {"seq_idx": numbers}, "position_ids": {"position_ids": positions}, "flash": flash}[how]


@KINDS
@pytest.mark.parametrize("how", ["seq_idx", "position_ids", "flash"])
def test_documents_start_afresh(kind, how):
    model = model_of(kind).train()
    documents, row = packed()
    expected = torch.cat([model(document).logits for document in documents], 1)
    weight = torch.randn(expected.shape)
    names, parameters = zip(*model.named_parameters(), strict=True)
    wanted = torch.autograd.grad((expected * weight).sum(), parameters)
    found = model(row, **said(how)).logits
    close(found, expected)
    got = torch.autograd.grad((found * weight).sum(), parameters)
    for name, one, other in zip(names, got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()), msg=name)
    assert not torch.allclose(model(row).logits, expected, atol=1e-3)


@KINDS
def test_documents_behind_a_cache_and_before_one(kind):
    """The first goes on from the cache; the last is what the cache then holds; padding in between."""
    model, before = model_of(kind), tokens(1, 6, seed=9)
    documents, row = packed()
    after = tokens(1, 4, seed=11)
    row = torch.cat([row[:, :8], torch.zeros(1, 2, dtype=torch.long), row[:, 8:]], 1)
    mask = torch.ones_like(row)
    mask[:, 8:10] = 0
    numbers = torch.cat([torch.full((1, n), i) for i, n in enumerate(LENGTHS)], 1)
    numbers = torch.cat([numbers[:, :8], numbers[:, 7:8].expand(1, 2), numbers[:, 8:]], 1)
    with torch.no_grad():
        cache = model(before, use_cache=True).cache
        found = model(row, seq_idx=numbers, attention_mask=mask, cache=cache).logits[mask.bool()]
        end = model(after, cache=cache).logits[0]
        alone = [model(torch.cat([before, documents[0]], 1)).logits[0, 6:]]
        alone += [model(document).logits[0] for document in documents[1:]]
        close(found, torch.cat(alone))
        close(end, model(torch.cat([documents[-1], after], 1)).logits[0, -4:])


def test_several_rows_with_other_documents():
    model = model_of("sequence")
    ids = tokens(3, 24)
    numbers = torch.tensor([[0] * 24, [0] * 3 + [1] * 21, [0] * 8 + [1] * 8 + [2] * 8])
    with torch.no_grad():
        found = model(ids, seq_idx=numbers).logits
        for row in range(3):
            pieces = [ids[row, numbers[row] == n][None] for n in numbers[row].unique()]
            close(found[row], torch.cat([model(piece).logits[0] for piece in pieces]))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.sampled_from([4, 16, 64]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_scan_of_documents(lengths, chunk_size, starts):
    """Against a scan of each, whatever their ends make of the chunks; and the state behind the last."""
    torch.manual_seed(0)
    total, H, P, N = sum(lengths), 2, 4, 3
    x, dt = torch.randn(1, total, H, P), torch.randn(1, total, H)
    B, C, A = torch.randn(1, total, 1, N), torch.randn(1, total, 1, N), -torch.rand(H) - 0.2
    first = torch.randn(1, H, P, N) if starts else None
    fixed = {"chunk_size": chunk_size, "D": torch.randn(H), "dt_bias": torch.randn(H), "dt_limit": (0.0, 9.0)}
    document = torch.cat([torch.full((1, n), i, dtype=torch.int32) for i, n in enumerate(lengths)], 1)
    y, last = scan.chunk_scan(
        x, dt, A, B, C, initial_states=first, return_final_states=True, document=document, **fixed
    )
    parts, end = [], None
    for i in range(len(lengths)):
        here = document[0] == i
        inputs = x[:, here], dt[:, here], A, B[:, here], C[:, here]
        state = first if i == 0 else None
        part, end = scan.chunk_scan(*inputs, initial_states=state, return_final_states=True, **fixed)
        parts.append(part)
    torch.testing.assert_close(y, torch.cat(parts, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, end, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seq_idx": torch.zeros(1, 7)}, "must have the shape"),
        ({"position_ids": torch.tensor([[0, 1, 5, 6]])}, "count up by one"),
        ({"cu_seq_lens": torch.tensor([0, 4])}, "single row"),
    ],
)
def test_wrong_documents(given, message):
    with pytest.raises(ValueError, match=message):
        documents_of((2, 4) if "cu_seq_lens" in given else (1, 4), **given)


@pytest.mark.parametrize("name", ["cache_position", "seq_ids", "cu_seqlens", "token_type_ids"])
def test_unknown_arguments_are_refused(name):
    model = model_of("dense")
    for each in (model, model.backbone):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            each(tokens(1, 4), **{name: torch.zeros(1, 4)})
