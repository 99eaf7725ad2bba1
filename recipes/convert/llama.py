"""The forward pass of a Llama-like Transformer as plain functions of its weights.

transformers' own forward pass is made to be changed; this one is made to be compiled, captured in CUDA graphs
and looked into layer by layer: what attention is given and what it answers is what mixers are matched to.
Touvron et al., arXiv 2302.13971: RMS norms, rotary positions, SwiGLU; Ainslie et al., arXiv 2305.13245:
key-value heads shared by groups of heads.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F

from spiking_mamba.model.llama import Layer, LlamaWeights, NotLlamaError, Shape, read_llama

__all__ = ["Llama", "attend", "rms_norm", "rotate"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``[..., C] -> [..., C]`` in the weight's dtype, computed in float32 (arXiv 1910.07467)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(weight.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions (Su et al., arXiv 2104.09864) in halves.

    ``x`` ``[..., P]``, ``cos`` and ``sin`` ``[..., P / 2]``.
    """
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)


def split_heads(qkv: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``[..., (H + 2 K) P] -> [..., H, P]``, and keys and values ``[..., K, P]``."""
    sizes = [count * shape.head_dim for count in (shape.heads, shape.kv_heads, shape.kv_heads)]
    query, key, value = qkv.split(sizes, dim=-1)
    return tuple(part.unflatten(-1, (-1, shape.head_dim)) for part in (query, key, value))  # type: ignore[return-value]


def attend(h: torch.Tensor, layer: Layer, shape: Shape, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Causal self-attention, ``[B, L, C] -> [B, L, C]``; ``cos`` and ``sin`` are ``[L, P / 2]``."""
    query, key, value = split_heads(F.linear(h, layer.qkv, layer.qkv_bias), shape)
    query, key = (rotate(t, cos[:, None], sin[:, None]) for t in (query, key))
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return F.linear(mixed.transpose(1, 2).flatten(2), layer.out, layer.out_bias)


def feed_forward(x: torch.Tensor, layer: Layer, eps: float) -> torch.Tensor:
    """What the MLP adds to the residual stream ``x`` ``[..., C]``."""
    gate, up = F.linear(rms_norm(x, layer.mlp_norm, eps), layer.gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, layer.down)


def run_layer(
    x: torch.Tensor, layer: Layer, shape: Shape, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The residual stream behind a layer (float32), attention's input, and what attention answers."""
    h = rms_norm(x, layer.attention_norm, shape.eps)
    a = attend(h, layer, shape, cos, sin)
    x = x + a
    return x + feed_forward(x, layer, shape.eps), h, a


@functools.cache
def _compiled_layer() -> Callable[..., Any]:
    return torch.compile(run_layer)  # one for all layers, being alike


@dataclass(frozen=True)
class Llama(LlamaWeights):
    """A model that runs.

    Attributes:
        frequencies: ``[P / 2]`` float32, radians a position. scale: of ``cos`` and ``sin``.
        compiles: run layers through ``torch.compile``.
    """

    frequencies: torch.Tensor
    scale: float = 1.0
    compiles: bool = False

    @classmethod
    def from_transformers(cls, model: Any) -> "Llama":
        """Of a ``LlamaForCausalLM`` or whatever is built alike, sharing its tensors.

        Raises:
            NotLlamaError: the model has other parts, or answers otherwise than these functions do.
        """
        weights = read_llama(model)
        rotary = getattr(model.model, "rotary_emb", None)
        if rotary is None:
            raise NotLlamaError(f"{type(model).__name__} has no rotary positions.")
        frequencies, scale = rotary.inv_freq.float().cpu(), float(rotary.attention_scaling)
        found = cls(**vars(weights), frequencies=frequencies, scale=scale)
        ids = torch.arange(24)[None] * 7 % found.shape.vocab_size
        with torch.no_grad():
            theirs = model.model(input_ids=ids, use_cache=False).last_hidden_state.float()
            ours = found.hidden_states(ids).float()
        error = float((theirs - ours).norm() / theirs.norm())
        if not error < 1e-3:
            raise NotLlamaError(f"{type(model).__name__} computes otherwise than a Llama (by {error:.2g}).")
        return found

    def to(self, device: str | torch.device, dtype: torch.dtype) -> "Llama":
        """A copy there; frequencies stay float32."""

        def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.detach().to(device, dtype).contiguous()

        embedding = moved(self.embedding)
        return replace(
            self,
            embedding=embedding,
            layers=tuple(Layer(*map(moved, layer)) for layer in self.layers),
            norm=moved(self.norm),
            head=embedding if self.head is self.embedding else moved(self.head),
            frequencies=self.frequencies.to(device),
        )

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``cos`` and ``sin`` ``[n, P / 2]``, float32, of positions ``[n]``."""
        angle = positions.float()[:, None] * self.frequencies
        return angle.cos() * self.scale, angle.sin() * self.scale

    def run(self, ids: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """:func:`run_layer` of every layer in turn, for ids ``[B, L]``."""
        cos, sin = self.angles(torch.arange(ids.shape[1], device=ids.device))
        x = F.embedding(ids, self.embedding).float()
        step = _compiled_layer() if self.compiles else run_layer
        for layer in self.layers:
            x, h, a = step(x, layer, self.shape, cos, sin)
            yield x, h, a

    def hidden_states(self, ids: torch.Tensor) -> torch.Tensor:
        """``[B, L] -> [B, L, C]``, behind the last norm."""
        for x, _, _ in self.run(ids):  # noqa: B007
            pass
        return rms_norm(x, self.norm, self.shape.eps)
