"""PEFT's adapters with spikes in front of them: trained, merged, saved, on float and on 4-bit weights."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig

from spiking_mamba import SpikingMambaForCausalLM, event_driven, spike_driven
from spiking_mamba.model.checkpoint import export, export_dense
from spiking_mamba.model.conversion import fold_thresholds
from spiking_mamba.model.gguf import write_gguf
from spiking_mamba.spikes import count_spikes
from tests.helpers.tiny import INTEGER, LEAKY, tiny_model, tokens

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

MLPS = {"layers_block_type": ["mamba", "mlp"], "intermediate_size": 64}
MODELS = {
    "dense": {},
    "mlps": {"neuron": INTEGER, **MLPS},
    "threshold": {"neuron": INTEGER, "threshold": 0.3, "use_bias": True},
    "learned": {"neuron": INTEGER, "learn_threshold": True, **MLPS},
    "sequence": {"neuron": LEAKY, "membrane": "sequence"},
}
IDS = tokens(4, 24)


def adapted(model, **settings):
    """The model with adapters that are not zero, its forward passes in evaluation."""
    settings = {"r": 4, "target_modules": ["in_proj", "out_proj"], "task_type": "CAUSAL_LM"} | settings
    return get_peft_model(model, LoraConfig(**settings))


def train(model, steps=12):
    """Losses of some steps on one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def merged_by_hand(base, adapters):
    """``W + alpha / r * B A`` for every pair of adapters."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for name, layer in adapters.base_model.model.named_modules():
            if hasattr(layer, "lora_A"):
                update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
                model.get_submodule(name).weight += layer.scaling["default"] * update
    return model


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_adapters_learn_and_merge(fields, tmp_path):
    base = tiny_model(**fields)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = adapted(copy.deepcopy(base))
    losses = train(model)
    assert losses[-1] < 0.9 * losses[0]
    after = {
        name.replace("base_layer.", ""): value for name, value in model.base_model.model.state_dict().items()
    }
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert sum("lora_" in name for name in after) == 2 * 2 * 2

    unmerged = logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(logits(again), unmerged)
    by_hand = merged_by_hand(base, model)
    merged = model.merge_and_unload()
    assert (logits(merged) - unmerged).abs().max() <= 1e-5
    assert (logits(merged) - logits(by_hand)).abs().max() <= 1e-5
    assert (unmerged - logits(base)).abs().max() > 0.1  # the adapters do something


@pytest.mark.parametrize("name", ["mlps", "threshold", "learned"])
def test_spikes_of_an_adapted_model(name):
    base = tiny_model(**MODELS[name])
    model = adapted(copy.deepcopy(base), init_lora_weights=False).eval()
    with count_spikes(model) as counts:
        unmerged = logits(model)
    assert (logits(spike_driven(model)) - unmerged).abs().max() <= 1e-5
    by_hand = merged_by_hand(base, model)
    merged = model.merge_and_unload()
    with count_spikes(merged) as counts_merged:
        logits(merged)
    assert counts_merged.accumulations == counts.accumulations > 0
    assert counts_merged.dense_macs == counts.dense_macs
    assert (logits(spike_driven(merged)) - unmerged).abs().max() <= 1e-5
    assert (logits(event_driven(merged)) - logits(event_driven(by_hand))).abs().max() <= 1e-4


def test_a_bias_of_the_adapter_is_added_once():
    model = adapted(tiny_model(**MODELS["threshold"]), lora_bias=True, init_lora_weights=False).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.default.bias"):
                parameter.normal_()
    unmerged, driven = logits(model), logits(spike_driven(model))
    merged = model.merge_and_unload()
    assert (logits(merged) - unmerged).abs().max() <= 1e-5
    assert (driven - unmerged).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"target_modules": "all-linear"},
        {"modules_to_save": ["embeddings", "lm_head"]},
        {"trainable_token_indices": [1, 2]},
        {"target_modules": ["embeddings", "in_proj"]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_other_adapters_merge(settings):
    model = adapted(tiny_model(**MODELS["mlps"]), **settings)
    losses = train(model, 4)
    assert losses[-1] < losses[0]
    unmerged = logits(model)
    assert (logits(model.merge_and_unload()) - unmerged).abs().max() <= 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = adapted(tiny_model(**MODELS["learned"])).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(gradient is not None for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0])


def test_what_reads_weights_wants_them_merged(tmp_path):
    model = adapted(tiny_model(neuron=INTEGER)).base_model.model
    for convert in (event_driven, fold_thresholds, lambda model: export(model, tmp_path / "a")):
        with pytest.raises(ValueError, match=r"in_proj is wrapped by Linear, .* merge it first"):
            convert(model)
    dense = adapted(tiny_model()).base_model.model
    for form in ("transformers", "state-spaces"):
        with pytest.raises(ValueError, match="merge it first"):
            export_dense(dense, tmp_path / "b", form)
    with pytest.raises(ValueError, match="merge it first"):
        write_gguf(dense, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def four_bit(folder):
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return SpikingMambaForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )


def test_adapters_on_four_bit_weights(tmp_path, monkeypatch):
    """QLoRA (Dettmers et al., arXiv 2305.14314): trained on NF4 weights, merged into what these stand for."""
    # its kernel for processors with AVX512-BF16 rounds to bfloat16 and wants outputs by 32s
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    base = tiny_model(neuron=INTEGER, threshold=0.5, hidden_size=64, num_heads=8, **MLPS)
    base.save_pretrained(tmp_path / "base")
    model = four_bit(tmp_path / "base")
    layers = [p.linear for p in model.projections().values()]
    assert [type(layer).__name__ for layer in layers] == ["Linear4bit"] * 4
    with pytest.raises(ValueError, match="dequantize"):
        event_driven(model)
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = adapted(model)
    losses = train(model)
    assert losses[-1] < 0.9 * losses[0]
    unmerged = logits(model)
    with count_spikes(model) as counts:
        logits(model)
    model.save_pretrained(tmp_path / "adapters")

    plain = four_bit(tmp_path / "base").dequantize()
    merged = PeftModel.from_pretrained(plain, tmp_path / "adapters").eval().merge_and_unload()
    assert (logits(merged) - unmerged).abs().max() <= 1e-4
    with count_spikes(merged) as counts_merged:
        logits(merged)
    assert counts_merged.accumulations == counts.accumulations
    assert (logits(spike_driven(merged)) - unmerged).abs().max() <= 1e-4
    assert logits(event_driven(merged)).isfinite().all()
