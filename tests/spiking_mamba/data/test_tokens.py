"""Tokens of long documents and of much text: those of the whole, without the memory of the whole."""

import random
import signal
import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from spiking_mamba.common.errors import DataError
from spiking_mamba.data import tokens as module
from spiking_mamba.data.pieces import pieces
from spiking_mamba.data.text import load_text
from spiking_mamba.data.tokens import END_OF_TEXT, document_stream, tokenize, train_tokenizer
from spiking_mamba.training.arguments import training_arguments
from spiking_mamba.training.rows import check_rows
from tests.helpers.commands import ROOT, run

WORDS = ["the", "quick", "brown", "fox's", "jumps,", "over", "12345", "lazy", "dogs...", "and", "naïve"]
WORDS += ["café", "ünder", "3,14159", "l'été", "--", "(so)", "<tag>"]
GAPS = (" ", " ", " ", " ", "\n", "\n\n", "  ", "\t", " \n ", "")


def prose(seed, words=2000):
    choose = random.Random(seed).choice
    return "".join(choose(WORDS) + choose(GAPS) for _ in range(words))


def chinese(seed, characters=6000):
    draw = random.Random(seed)
    return "".join(draw.choice("的一是不了人我在有他这中大来上国，。") for _ in range(characters))


def made(model, trainer, normalizer=None, pre_tokenizer=None, post_processor=None):
    tokenizer = tokenizers.Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([prose(n) for n in range(20)] + [chinese(0)], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, unk_token="[U]"
    )


SPECIAL = {"special_tokens": [END_OF_TEXT, "[U]"], "show_progress": False}
GPT4 = (
    r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KINDS = {
    "byte level": lambda: train_tokenizer([prose(n) for n in range(20)], 400),
    "GPT-4": lambda: made(
        models.BPE(),
        trainers.BpeTrainer(vocab_size=500, **SPECIAL),
        pre_tokenizer=pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(GPT4), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    ),
    "metaspace": lambda: made(
        models.BPE(unk_token="[U]"),
        trainers.BpeTrainer(vocab_size=500, **SPECIAL),
        pre_tokenizer=pre_tokenizers.Metaspace(),
    ),
    "words across spaces": lambda: made(
        models.BPE(unk_token="[U]"),
        trainers.BpeTrainer(vocab_size=500, max_token_length=8, **SPECIAL),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    ),
    "unigram": lambda: made(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=300, unk_token="[U]", **SPECIAL),
        normalizer=normalizers.NFKC(),
        pre_tokenizer=pre_tokenizers.Metaspace(),
    ),
    "word pieces": lambda: made(
        models.WordPiece(unk_token="[U]"),
        trainers.WordPieceTrainer(vocab_size=400, **SPECIAL),
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
    ),
    "prefix space": lambda: made(
        models.BPE(),
        trainers.BpeTrainer(vocab_size=500, **SPECIAL),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True),
        post_processor=processors.ByteLevel(trim_offsets=True),
    ),
}


def encoder(tokenizer):
    return lambda texts: tokenizer(list(texts), add_special_tokens=False).input_ids


@pytest.fixture(scope="module", params=KINDS)
def encode(request):
    return encoder(KINDS[request.param]())


@pytest.fixture(scope="module")
def tokenizer():
    return KINDS["byte level"]()


# --- pieces ---


@pytest.mark.parametrize(
    "text", [prose(1), chinese(1), prose(2) + chinese(2), "<|endoftext|> ".join([prose(3)] * 2)]
)
@pytest.mark.parametrize("size", [100, 700])
def test_the_tokens_of_pieces_are_those_of_the_whole(encode, text, size):
    found = list(pieces(text, encode, size))
    assert [token for ids in encode(found) for token in ids] == encode([text])[0]


@settings(deadline=None, max_examples=300)
@given(
    text=st.lists(st.sampled_from([*WORDS, *GAPS, "的一", "，", "é", "\u0301", "🙂", "\r\n"])).map("".join)
)
def test_whatever_the_text(tokenizer, text):
    encode = encoder(tokenizer)
    found = list(pieces(text * 20, encode, 60))
    assert [token for ids in encode(found) for token in ids] == encode([text * 20])[0]


def test_pieces_are_short_where_there_are_cuts(tokenizer):
    for text in (prose(1), chinese(1)):
        found = list(pieces(text, encoder(tokenizer), 500))
        assert len(found) > len(text) // 1000
        assert max(map(len, found)) < 1000


@pytest.mark.parametrize("text", ["", " ", "a", "a" * 5000, "\n" * 5000, " a" * 3])
def test_texts_without_a_good_cut_are_left_whole_or_cut_well(encode, text):
    found = list(pieces(text, encode, 100))
    assert [token for ids in encode(found) for token in ids] == encode([text])[0]


def test_documents_of_every_length(tokenizer, monkeypatch):
    """Against each tokenized alone, whatever batches they come in."""
    texts = ["", "a", prose(1, 1), *(prose(n, n) for n in (10, 3000, 100)), ""]
    dataset = datasets.Dataset.from_dict({"text": texts})
    expected = [t for text in texts for t in (tokenizer.eos_token_id, *tokenizer(text).input_ids)]
    for characters, number, size in ((2**20, 1000, 2**16), (1, 1, 50), (300, 2, 200)):
        monkeypatch.setattr(module, "_CHARACTERS", characters)
        monkeypatch.setattr(module, "_PIECES", number)
        monkeypatch.setattr(module, "pieces", lambda text, encode, size=size: pieces(text, encode, size))
        found = document_stream(dataset, tokenizer)
        assert (found.dtype, found.tolist()) == (np.dtype(np.int32), expected)


def test_one_long_document_takes_memory_by_the_piece(tmp_path):
    """8 MB took 1.4 GB."""
    script = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import datasets
from tests.spiking_mamba.data.test_tokens import *
own = KINDS["byte level"]()
document_stream(datasets.Dataset.from_dict({{"text": [prose(0, 20000)]}}), own)
text = prose(1, 100_000)
text = text * (8_000_000 // len(text))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
document_stream(datasets.Dataset.from_dict({{"text": [text]}}), own)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 300  # MiB, of which a fifth is the text and its copies


# --- much text ---


@pytest.fixture
def much(monkeypatch, tmp_path):
    """What is little text is taken for much."""
    monkeypatch.setenv("SPIKING_MAMBA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "IN_MEMORY", 1000)
    return tmp_path / "cache/tokens"


def text_of(number=40, words=60):
    return datasets.Dataset.from_dict({"text": [prose(n, words) for n in range(number)]})


def test_tokens_of_much_text_are_mapped_and_the_same(tokenizer, tmp_path, monkeypatch, capsys):
    expected = tokenize(text_of(), tokenizer, 16)
    monkeypatch.setenv("SPIKING_MAMBA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "IN_MEMORY", 1000)
    before = pa.total_allocated_bytes()
    found = tokenize(text_of(), tokenizer, 16)
    assert pa.total_allocated_bytes() - before < 4 * 16 * len(found)
    assert found["input_ids"][:] == expected["input_ids"][:]
    assert found.features == expected.features
    arguments = training_arguments(tmp_path, {"per_device_train_batch_size": 2}, 0)
    check_rows(found, arguments, 400)
    shuffled = [rows.shuffle(seed=1)["input_ids"][:] for rows in (found, expected)]
    assert shuffled[0] == shuffled[1]
    assert "tokens are kept in" in capsys.readouterr().err


def test_tokens_are_made_once(tokenizer, much, monkeypatch):
    first = document_stream(text_of(), tokenizer)
    monkeypatch.setattr(module, "_encoded", lambda *_: pytest.fail("tokenized again"))
    assert isinstance(first, np.memmap)
    assert np.array_equal(document_stream(text_of(), tokenizer), first)
    assert len(list(much.glob("*.int32"))) == 1


@pytest.mark.parametrize("change", ["text", "border", "order", "tokenizer", "end"])
def test_whatever_the_tokens_depend_on_makes_others(tokenizer, much, change):
    texts = ["a" * 600, "b" * 600, "c"]
    document_stream(datasets.Dataset.from_dict({"text": texts}), tokenizer)
    own = tokenizer
    if change == "text":
        texts[2] = "d"
    elif change == "border":
        texts = [texts[0] + "b", texts[1][1:], "c"]
    elif change == "order":
        texts = texts[::-1]
    elif change == "tokenizer":
        own = train_tokenizer(texts, 300)
    else:
        own = train_tokenizer([prose(n) for n in range(20)], 400)
        own.eos_token = "a"
    found = document_stream(datasets.Dataset.from_dict({"text": texts}), own)
    assert len(list(much.glob("*.int32"))) == 2
    alone = [t for text in texts for t in (own.eos_token_id, *own(text).input_ids)]
    assert found.tolist() == alone


KILLED = """
import os, signal, sys
from tests.spiking_mamba.data import test_tokens as t
t.module.IN_MEMORY, t.module._CHARACTERS = 1000, 500
encoded = t.module._encoded
def dying(*arguments):
    for number, ids in enumerate(encoded(*arguments)):
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        yield ids
t.module._encoded = dying
t.document_stream(t.text_of(int(sys.argv[1])), t.KINDS["byte level"]())
"""


def test_a_killed_process_leaves_nothing_for_ever(tokenizer, much):
    for number in (40, 30):  # the same text as below, and another
        done = run("-c", KILLED, number)
        assert done.returncode == -signal.SIGKILL
    assert len(list(much.glob("*.part"))) >= 1
    found = document_stream(text_of(), tokenizer)
    assert not list(much.glob("*.part"))
    expected = [t for text in text_of()["text"] for t in (0, *tokenizer(text).input_ids)]
    assert found.tolist() == expected


def test_no_room_for_tokens_is_said(tokenizer, much):
    much.parent.write_text("in the way")
    with pytest.raises(DataError, match=r"cannot be kept in .*SPIKING_MAMBA_CACHE"):
        document_stream(text_of(), tokenizer)


def test_hub_text_is_not_written_again(monkeypatch):
    def load_dataset(*args, **options):
        return datasets.Dataset.from_dict({"text": ["a b", "c"], "id": range(2)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.Dataset, "cast_column", None)
    assert load_text("owner/name")["text"][:] == ["a b", "c"]


def test_rows_of_a_large_file_take_no_memory(tmp_path):
    """A file of 1.2 GB, all of which a training may read, in a process that may take 0.5 GB more."""
    path = tmp_path / "tokens"
    with path.open("wb") as file:
        file.truncate(1_200_000_000)
    script = f"""
import resource, sys
import datasets, numpy as np, pyarrow as pa
from spiking_mamba.data import tokens
from spiking_mamba.training.rows import check_rows, collate
from types import SimpleNamespace
tokens._is_small = lambda dataset: False
tokens._token_file = lambda *_: {str(path)!r}
tokenizer = SimpleNamespace(eos_token_id=0)
before = pa.total_allocated_bytes()
rows = tokens.tokenize(None, tokenizer, 2048)
assert len(rows) == 299_999_999 // 2048
check_rows(rows, SimpleNamespace(per_device_train_batch_size=8), 10)
batch = collate([rows[n] for n in (0, len(rows) // 2, len(rows) - 1)])
assert batch["input_ids"].shape == (3, 2048)
print((pa.total_allocated_bytes() - before) // 2**20)
"""
    done = run("-c", script)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 10


@pytest.mark.parametrize("size", [256, 0, -5, True, 300.0, "300", 2**20 + 1, 10**12, 2**63, 2**70, None])
def test_vocabularies_of_bad_sizes(size):
    with pytest.raises(DataError, match=r"vocab_size is .*at least 257"):
        train_tokenizer(["a"], size)
