"""A dense model as a GGUF file, which llama.cpp reads: the rival that a benchmark on processors needs."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from spiking_mamba.model.modeling import SpikingMambaForCausalLM
from spiking_mamba.model.projection import reject_wrapped

__all__ = ["write_gguf"]

# what a block's tensors are called in llama.cpp, and their shapes where they differ
_NAMES = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.norm.weight": "ssm_norm.weight",
    "mixer.out_proj.weight": "ssm_out.weight",
}


def _as_there(name: str, tensor: torch.Tensor, groups: int) -> torch.Tensor:
    if name == "mixer.A_log":
        return -torch.exp(tensor)[:, None]
    if name == "mixer.D":
        return tensor[:, None]
    if name == "mixer.conv1d.weight":
        return tensor[:, 0]
    return tensor.view(groups, -1) if name == "mixer.norm.weight" else tensor


def write_gguf(model: SpikingMambaForCausalLM, path: str | Path) -> None:
    """Write a dense model, float32 and without a tokenizer; whole or not at all.

    Args:
        model: ``config.neuron`` is None; its convolution has a bias and its projections have none.
        path: of the file.

    Raises:
        ModuleNotFoundError: the package ``gguf`` is not installed.
        ValueError: the model is spiking, has MLP layers, biases that the format does not know, or an adapter
            that is not merged.
    """
    from gguf import GGUFWriter

    config = model.config
    if config.neuron is not None:
        raise ValueError("llama.cpp knows no spikes: only a dense model can be written as GGUF.")
    if config.number_of_blocks("mlp"):
        raise ValueError("A GGUF Mamba2 has no MLP layers: this model cannot be written as GGUF.")
    if config.use_bias or not config.use_conv_bias:
        raise ValueError("A GGUF Mamba2 has a bias in its convolution and none in its projections.")
    reject_wrapped(model)
    unfinished = Path(f"{path}.unfinished")
    writer = GGUFWriter(unfinished, "mamba2")
    _describe(writer, config)
    weights = {name: tensor.detach().float().cpu() for name, tensor in model.state_dict().items()}

    def add(name: str, tensor: torch.Tensor) -> None:
        writer.add_tensor(name, np.ascontiguousarray(tensor.numpy()))

    add("token_embd.weight", weights["backbone.embeddings.weight"])
    add("output_norm.weight", weights["backbone.norm_f.weight"])
    if not config.tie_word_embeddings:
        add("output.weight", weights["lm_head.weight"])
    for layer in range(config.num_hidden_layers):
        for name, there in _NAMES.items():
            tensor = weights[f"backbone.layers.{layer}.{name}"]
            add(f"blk.{layer}.{there}", _as_there(name, tensor, config.n_groups))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.replace(path)


def _describe(writer: Any, config: Any) -> None:
    writer.add_name("mamba2")
    writer.add_context_length(2**20)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(config.num_heads * config.head_dim)
    writer.add_ssm_state_size(config.state_size)
    writer.add_ssm_time_step_rank(config.num_heads)
    writer.add_ssm_group_count(config.n_groups)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_file_type(0)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
