"""The weights of a Llama-like Transformer: RMS norms, rotary positions, SwiGLU, shared key-value heads.

Touvron et al., arXiv 2302.13971; Ainslie et al., arXiv 2305.13245.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

__all__ = ["Layer", "LlamaWeights", "NotLlamaError", "Shape", "read_llama"]


class NotLlamaError(ValueError):
    """A model has a part that these functions do not know."""


class Shape(NamedTuple):
    """Widths of a model; ``eps`` is of its norms."""

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    eps: float


class Layer(NamedTuple):
    """Weights of one layer, as ``F.linear`` takes them.

    Query, key and value rows are stacked in ``qkv``, gate and up rows in ``gate_up``.
    """

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    out: torch.Tensor
    out_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class LlamaWeights:
    """A model's weights but for its positions.

    Attributes:
        embedding, head: ``[vocab_size, C]``; one tensor where they are tied. norm: ``[C]``, the last one.
    """

    shape: Shape
    embedding: torch.Tensor
    layers: tuple[Layer, ...]
    norm: torch.Tensor
    head: torch.Tensor


def read_llama(model: Any) -> LlamaWeights:
    """Those of a ``LlamaForCausalLM`` or whatever is built alike, sharing its tensors.

    Raises:
        NotLlamaError: the model has other parts.
    """
    try:
        return _read(model)
    except AttributeError as error:
        raise NotLlamaError(f"{type(model).__name__} is not built like a Llama: {error}.") from None


def _read(model: Any) -> LlamaWeights:
    config, backbone = model.config, model.model
    if config.hidden_act not in ("silu", "swish"):
        raise NotLlamaError(f"The MLP's activation is {config.hidden_act}, not SiLU.")
    layers = tuple(_read_layer(layer) for layer in backbone.layers)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = Shape(
        config.hidden_size,
        config.num_attention_heads,
        getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim,
        layers[0].down.shape[1],
        config.vocab_size,
        config.rms_norm_eps,
    )
    embedding, head = backbone.embed_tokens.weight.data, model.lm_head.weight.data
    if head.data_ptr() == embedding.data_ptr():
        head = embedding
    return LlamaWeights(shape, embedding, layers, backbone.norm.weight.data, head)


def _read_layer(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    heads = (attention.q_proj, attention.k_proj, attention.v_proj)
    biases = [projection.bias for projection in heads]
    if any(projection.bias is not None for projection in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
        raise NotLlamaError("The MLP has biases.")
    return Layer(
        layer.input_layernorm.weight.data,
        torch.cat([projection.weight.data for projection in heads]),
        None if biases[0] is None else torch.cat([bias.data for bias in biases]),
        attention.o_proj.weight.data,
        None if attention.o_proj.bias is None else attention.o_proj.bias.data,
        layer.post_attention_layernorm.weight.data,
        torch.cat([mlp.gate_proj.weight.data, mlp.up_proj.weight.data]),
        mlp.down_proj.weight.data,
    )
