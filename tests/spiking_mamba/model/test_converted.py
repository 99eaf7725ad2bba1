"""Models converted from a Transformer: mixers from a folder, the rest from the source."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from spiking_mamba import SpikingMambaConfig, SpikingMambaForCausalLM
from spiking_mamba.common.errors import CheckpointError
from spiking_mamba.common.files import file_sha256
from spiking_mamba.data import train_tokenizer
from spiking_mamba.model.checkpoint import load_dense, load_model
from spiking_mamba.model.converted import load_mixers
from spiking_mamba.model.tokenizer import load_tokenizer

LAYERS, WIDTH, MLP, VOCABULARY = 2, 32, 48, 300


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder of a Llama and its tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("source")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        tie_word_embeddings=True,
        eos_token_id=7,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    train_tokenizer(["a few words, and a few more"] * 9, VOCABULARY).save_pretrained(folder)
    return folder


def config():
    return SpikingMambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2 * LAYERS,
        layers_block_type=["mamba", "mlp"] * LAYERS,
        intermediate_size=MLP,
        num_heads=4,
        head_dim=16,
        n_groups=2,
        state_size=16,
        use_bias=True,
        tie_word_embeddings=True,
    )


def write(folder, source, bits=4, group=16):
    """A converted model's folder, packed by hand; the weights that should be read from it, by name."""
    folder.mkdir()
    config().save_pretrained(folder)
    random, packed, wanted = np.random.default_rng(bits), {}, {}
    for name, parameter in SpikingMambaForCausalLM(config()).named_parameters():
        place = name.split(".")
        if ".mixer." not in name or int(place[2]) % 2:
            continue
        own = f"{int(place[2]) // 2}.{'.'.join(place[4:])}"
        if parameter.ndim != 2:
            value = random.uniform(0.1, 0.4, tuple(parameter.shape)).astype(np.float32)
            packed[own] = wanted[name] = value
            continue
        out, inputs = parameter.shape
        most = 2 ** (bits - 1) - 1
        whole = random.integers(-most, most + 1, (out, inputs))
        scale = random.uniform(0.01, 0.02, (out, inputs // group)).astype(np.float16)
        packed[f"{own}:scale"] = scale
        if bits == 4:
            pairs = (whole + 8).reshape(-1, 2).astype(np.uint8)
            packed[f"{own}:nibbles"] = pairs[:, 0] + 16 * pairs[:, 1]
        else:
            packed[f"{own}:integers"] = whole.astype(np.int8)
        wanted[name] = np.stack(
            [[whole[o, i] * np.float32(scale[o, i // group]) for i in range(inputs)] for o in range(out)]
        ).astype(np.float32)
    names = sorted(packed)
    files = [f"mixers-{k:02d}.safetensors" for k in range(2)]
    for k, file in enumerate(files):
        save_file({name: packed[name] for name in names[k::2]}, folder / file)
    (folder / "mixers.json").write_text(json.dumps({"source": str(source), "files": files}))
    return wanted


@pytest.mark.parametrize("bits", [4, 8])
def test_mixers_come_from_the_folder_and_the_rest_from_the_source(source, tmp_path, bits):
    wanted = write(tmp_path / "model", source, bits)
    model = load_dense(tmp_path / "model")
    found = dict(model.named_parameters())
    for name, value in wanted.items():
        torch.testing.assert_close(found.pop(name).detach(), torch.from_numpy(value), rtol=1e-6, atol=0)
    theirs = LlamaForCausalLM.from_pretrained(source).state_dict()
    assert torch.equal(found.pop("backbone.embeddings.weight"), theirs["model.embed_tokens.weight"])
    assert torch.equal(found.pop("backbone.norm_f.weight"), theirs["model.norm.weight"])
    for k in range(LAYERS):
        layer = f"model.layers.{k}"
        assert torch.equal(
            found.pop(f"backbone.layers.{2 * k}.norm.weight"), theirs[f"{layer}.input_layernorm.weight"]
        )
        mlp = f"backbone.layers.{2 * k + 1}"
        assert torch.equal(
            found.pop(f"{mlp}.norm.weight"), theirs[f"{layer}.post_attention_layernorm.weight"]
        )
        gate, up = found.pop(f"{mlp}.mixer.in_proj.weight").chunk(2)
        assert torch.equal(gate, theirs[f"{layer}.mlp.gate_proj.weight"])
        assert torch.equal(up, theirs[f"{layer}.mlp.up_proj.weight"])
        assert torch.equal(found.pop(f"{mlp}.mixer.out_proj.weight"), theirs[f"{layer}.mlp.down_proj.weight"])
    assert not found
    assert model.lm_head.weight is model.backbone.embeddings.weight
    assert not model.training
    assert model.generation_config.eos_token_id == 7
    words = "a few words"
    assert load_tokenizer(tmp_path / "model")(words) == AutoTokenizer.from_pretrained(source)(words)


def test_it_decodes_and_streams_as_it_reads_and_is_saved_as_any_model(source, tmp_path):
    write(tmp_path / "model", source)
    model = load_model(tmp_path / "model")
    ids = torch.randint(8, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids).logits
        pieces, cache = [], None
        for piece in ids.split([5, 1, 1, 4, 1], dim=1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-4, rtol=1e-4)
        decoded = model.generate(ids, max_new_tokens=6, do_sample=False)
        again = model(decoded).logits[:, 11:-1].argmax(-1)
    alive = (decoded[:, 12:] == 7).cumsum(1) - (decoded[:, 12:] == 7).long() == 0
    assert torch.equal(again[alive], decoded[:, 12:][alive])
    model.save_pretrained(tmp_path / "whole")
    with torch.no_grad():
        torch.testing.assert_close(load_dense(tmp_path / "whole")(ids).logits, whole)
    student = SpikingMambaForCausalLM.from_dense(model, neuron={"class": "neurons.SILIFNode"})
    assert len(student.projections()) == 4 * LAYERS  # those of mixers and those of MLPs


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: (f / "mixers.json").write_text("{"), "is no JSON"),
        (lambda f: (f / "mixers.json").write_text('{"files": []}'), "does not name a source"),
        (lambda f: change(f / "mixers.json", files=["../other.safetensors"]), "files beside it"),
        (lambda f: change(f / "mixers.json", files=[3]), "files beside it"),
        (lambda f: change(f / "mixers.json", files=[]), "files beside it"),
        (lambda f: change(f / "mixers.json", files=[".."]), "files beside it"),
        (lambda f: change(f / "mixers.json", files=[""]), "files beside it"),
        (lambda f: (f / "mixers-01.safetensors").unlink(), "incomplete: it lacks mixers-01.safetensors"),
        (lambda f: (f / "mixers-01.safetensors").write_bytes(b"\0" * 50), "damaged mixers"),
        (lambda f: change(f / "mixers.json", files=["mixers-00.safetensors"]), "damaged mixers"),
        (lambda f: change(f / "mixers.json", source="/no/such/source"), "source=/no/such/source cannot"),
        (lambda f: change(f / "config.json", num_hidden_layers=10**9, layers_block_type=None), "layers"),
        (lambda f: change(f / "config.json", hidden_size=64), "cannot be loaded|does not fit"),
        (lambda f: change(f / "config.json", hidden_act="sillu"), "hidden_act .* 'sillu'"),
        (lambda f: change(f / "config.json", model_type="llama"), "model_type='llama'"),
        (lambda f: change(f / "config.json", neuron={"class": "neurons.SILIFNode"}), "from_dense"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(source, tmp_path, spoil, told):
    write(tmp_path / "model", source)
    spoil(tmp_path / "model")
    for load in (load_dense, load_model):
        with pytest.raises(CheckpointError, match=told) as caught:
            load(tmp_path / "model")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_link_that_leaves_the_folder_is_not_followed(source, tmp_path, load):
    write(tmp_path / "model", source)
    (tmp_path / "model/mixers.json").rename(tmp_path / "elsewhere.json")
    (tmp_path / "model/mixers.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match="leaves its folder"):
        load(tmp_path / "model")


def test_a_source_with_a_head_of_its_own_keeps_it(source, tmp_path):
    """Whatever config.json says of ties."""
    llama = LlamaForCausalLM.from_pretrained(source)
    llama.config.tie_word_embeddings = False
    llama.lm_head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, WIDTH))
    llama.save_pretrained(tmp_path / "source")
    write(tmp_path / "model", tmp_path / "source")
    model = load_model(tmp_path / "model")
    assert torch.equal(model.lm_head.weight, llama.lm_head.weight)
    assert not model.config.tie_word_embeddings


def test_a_byte_that_changed_is_noticed(source, tmp_path):
    """Where the index has checksums, as what is packed now has."""
    write(tmp_path / "model", source)
    files = sorted((tmp_path / "model").glob("mixers-*"))
    sums = {path.name: file_sha256(path) for path in files}
    change(tmp_path / "model/mixers.json", sha256=sums)
    whole = load_model(tmp_path / "model").state_dict()
    content = bytearray(files[1].read_bytes())
    content[-1] ^= 1
    files[1].write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged mixers: mixers-01\.safetensors has another sha256"):
        load_model(tmp_path / "model")
    with pytest.raises(CheckpointError, match="another sha256"):
        load_mixers(SpikingMambaForCausalLM(config()), tmp_path / "model")
    change(tmp_path / "model/mixers.json", sha256={})
    found = load_model(tmp_path / "model").state_dict()
    assert any(not torch.equal(found[name], value) for name, value in whole.items())
    change(tmp_path / "model/mixers.json", sha256=[1])
    with pytest.raises(CheckpointError, match="no mapping"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("name", ["/no/such/model", "no/such/model", "./model", "~/no-such-model"])
def test_a_tokenizer_of_no_folder(name):
    with pytest.raises(CheckpointError, match="There is no folder"):
        load_tokenizer(name)


def test_what_the_hub_says_stands_in_one_line(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network\nand\nno cache")

    monkeypatch.setattr("spiking_mamba.common.checkpoint_files.snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=r"weights/typo is neither .*: no network and no cache$"):
        load_model("weights/typo")


def test_from_pretrained_says_what_reads_packed_mixers(source, tmp_path):
    write(tmp_path / "model", source)
    with pytest.raises(CheckpointError, match="load_model reads"):
        SpikingMambaForCausalLM.from_pretrained(tmp_path / "model")


def test_mixers_of_another_model_are_refused(source, tmp_path):
    write(tmp_path / "model", source)
    fields = config().to_dict()
    smaller = fields | {"num_hidden_layers": 2, "layers_block_type": ["mamba", "mlp"]}
    for other in (smaller, fields | {"use_bias": False}, fields | {"n_groups": 1}):
        model = SpikingMambaForCausalLM(SpikingMambaConfig.from_dict(other))
        with pytest.raises(CheckpointError, match="the mixers of another model"):
            load_mixers(model, tmp_path / "model")
    model = SpikingMambaForCausalLM(config())
    assert load_mixers(model, tmp_path / "model")["source"] == str(source)
