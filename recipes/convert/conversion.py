"""A Transformer's weights as those of a Mamba2 with MLP blocks.

Attention without its softmax and its positions is the scan of a state-space dual: ``C`` is the query, ``B``
the key, ``x`` the value (Dao & Gu, arXiv 2405.21060, section 5), which is where the mixers start (as Wang et
al., arXiv 2408.15237, and Bick et al., arXiv 2408.10189, do). Rotary positions have no counterpart there; two
decays a head, a fast and a slow one, take their place.
"""

import math

import torch

from spiking_mamba import SpikingMambaConfig, SpikingMambaForCausalLM
from spiking_mamba.model.block import SpikingMambaMixer
from spiking_mamba.model.converted import kept_weights, mixers_of
from spiking_mamba.model.llama import Layer, LlamaWeights, NotLlamaError, Shape

__all__ = ["convert", "start_mixer", "student_config"]

_GATE = 1.2785  # SiLU(1.2785) = 1: the gate starts open
_TIME_STEPS = 0.003, 0.3  # of a head's copies, slowest and fastest; A is -1
_SKIP = 0.1  # D


def student_config(shape: Shape, layers: int, tied: bool, expand: int = 2) -> SpikingMambaConfig:
    """A Mamba2 with a head of ``expand`` copies for every head of attention, and its own MLPs.

    Raises:
        NotLlamaError: attention is wider or narrower than the residual stream.
    """
    if shape.heads * shape.head_dim != shape.hidden_size:
        raise NotLlamaError(
            f"{shape.heads} heads of {shape.head_dim} are not as wide as the residual stream, "
            f"{shape.hidden_size}."
        )
    return SpikingMambaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=2 * layers,
        layers_block_type=["mamba", "mlp"] * layers,
        intermediate_size=shape.intermediate_size,
        expand=expand,
        num_heads=expand * shape.heads,
        head_dim=shape.head_dim,
        n_groups=shape.heads,
        state_size=shape.head_dim,
        layer_norm_epsilon=shape.eps,
        use_bias=True,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


@torch.no_grad()
def start_mixer(
    mixer: SpikingMambaMixer, layer: Layer, shape: Shape, generator: torch.Generator | None = None
) -> None:
    """Give a mixer its attention layer's weights: B from keys, C from queries, x from values, out from out.

    Key-value heads that heads share are repeated. The convolution passes its input on (its SiLU does not).
    """
    heads, width, expand = shape.heads, shape.head_dim, mixer.num_heads // shape.heads
    inner, groups = mixer.intermediate_size, heads * width
    sizes = [count * width for count in (heads, shape.kv_heads, shape.kv_heads)]
    query, key, value = (part.unflatten(0, (-1, width)) for part in layer.qkv.float().split(sizes))
    key, value = (part.repeat_interleave(heads // shape.kv_heads, dim=0) for part in (key, value))

    weight, bias = mixer.in_proj.weight, mixer.in_proj.bias
    weight.normal_(0.0, 0.002, generator=generator)
    bias.zero_()
    bias[:inner] = _GATE
    rest = weight[inner:]
    rest[:inner] = value.repeat_interleave(expand, dim=0).flatten(0, 1)
    rest[inner : inner + groups] = key.flatten(0, 1)
    rest[inner + groups : inner + 2 * groups] = query.flatten(0, 1)

    out = layer.out.float().unflatten(1, (heads, width)).repeat_interleave(expand, dim=1) / expand
    mixer.out_proj.weight.copy_(out.flatten(1))
    mixer.out_proj.bias.zero_()
    mixer.conv1d.weight.zero_()
    mixer.conv1d.weight[:, 0, -1] = 1.0
    mixer.conv1d.bias.zero_()
    mixer.norm.weight.fill_(1.0)
    mixer.A_log.zero_()
    mixer.D.fill_(_SKIP)
    low, high = map(math.log, _TIME_STEPS)
    dt = torch.linspace(low, high, expand, device=weight.device).exp().repeat(heads)
    mixer.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


@torch.no_grad()
def convert(source: LlamaWeights, expand: int = 2, seed: int = 0) -> SpikingMambaForCausalLM:
    """A dense model whose MLPs, norms and embeddings are the source's; its mixers start from its attention.

    In float32 on the CPU, in evaluation mode.
    """
    shape = source.shape
    tied = source.head is source.embedding
    model = SpikingMambaForCausalLM(student_config(shape, len(source.layers), tied, expand))
    model.load_state_dict(kept_weights(source), strict=False)
    generator = torch.Generator().manual_seed(seed)
    for mixer, layer in zip(mixers_of(model), source.layers, strict=True):
        start_mixer(mixer, Layer(*(t if t is None else t.cpu() for t in layer)), shape, generator)
    return model.eval()
