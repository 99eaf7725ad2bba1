"""Checkpoint folders as others write them."""

import json

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from tests.helpers.tiny import (
    SHAPE,
    shake,
    tokens,
)

IDS = tokens(2, 12)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def transformers_folder(folder, **fields):
    torch.manual_seed(0)
    model = shake(Mamba2ForCausalLM(Mamba2Config(**SHAPE | fields)))
    model.save_pretrained(folder)
    return model


def state_spaces_folder(folder, tied=True, weights_of=None, **settings):
    """A folder as state-spaces publishes them, made of a transformers model."""
    torch.manual_seed(0)
    model = shake(Mamba2ForCausalLM(Mamba2Config(**SHAPE | {"tie_word_embeddings": tied})))
    weights = {k.replace("embeddings.", "embedding."): v for k, v in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / "pytorch_model.bin")
    config = {
        "d_model": 32,
        "d_intermediate": 0,
        "n_layer": 2,
        "vocab_size": 59,  # the weights are padded to a multiple
        "ssm_cfg": {"layer": "Mamba2"},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 61,
        "tie_embeddings": tied,
    }
    (folder / "config.json").write_text(json.dumps(config | settings))
    return model
