"""Operations and memory traffic of a token, by formula; ``docs/energy.md`` has the table."""

from spiking_mamba.model.configuration import SpikingMambaConfig

__all__ = ["operations", "shifts", "sizes", "traffic"]


def operations(config: SpikingMambaConfig) -> dict[str, int]:
    """Operations of one token in the whole model, by formula.

    MACs, where a lone multiplication or a nonlinear function counts as one, but for ``additions``
    (residuals and biases), which are accumulations. The scan is counted in its recurrent form, the least
    that any schedule of it does. ``docs/energy.md`` has the table.
    """
    width, inner, state, heads = config.hidden_size, _inner(config), config.state_size, config.num_heads
    conv = inner + 2 * config.n_groups * state
    layers, mlps, gated = config.number_of_blocks("mamba"), config.number_of_blocks("mlp"), _gated(config)
    biases = conv * config.use_conv_bias + (_in_proj_width(config) + width) * config.use_bias
    counts = {
        "embedding": 0,  # a look-up
        "in_proj": layers * width * _in_proj_width(config) + mlps * width * 2 * gated,
        "conv": layers * conv * (config.conv_kernel + 1),  # the taps, then SiLU
        # dt: bias and softplus, dt * A, exp; dt * x and D * x; for every state: decay, input, output
        "scan": layers * (3 * heads + 2 * inner + 3 * inner * state),
        # RMS norm: square, scale, weight; of a block, of the gated output after silu(z) and its product
        "norms": layers * (3 * width + 5 * inner) + mlps * 3 * width + 3 * width,
        "out_proj": layers * inner * width + mlps * gated * width,
        "lm_head": width * config.vocab_size,
        "additions": layers * (width + biases) + mlps * width,
    }
    return counts | ({"mlp": mlps * 2 * gated} if mlps else {})  # SiLU of the gate and its product


def _inner(config: SpikingMambaConfig) -> int:
    return int(config.expand * config.hidden_size)


def _gated(config: SpikingMambaConfig) -> int:
    """Width of the MLP blocks, 0 without."""
    return config.intermediate_size or 0


def _in_proj_width(config: SpikingMambaConfig) -> int:
    return 2 * _inner(config) + 2 * config.n_groups * config.state_size + config.num_heads


def traffic(config: SpikingMambaConfig, batch: int, length: int) -> dict[str, float]:
    """Numbers that the rest of the model, all but its projections, moves through memory for one token.

    Of a pass over ``batch`` sequences of ``length`` tokens: weights once a pass, states in and out once a
    sequence, every operand and result once a token.
    """
    width, inner, state, heads = config.hidden_size, _inner(config), config.state_size, config.num_heads
    conv, layers = inner + 2 * config.n_groups * state, config.number_of_blocks("mamba")
    mlps, gated = config.number_of_blocks("mlp"), _gated(config)
    biases = conv * config.use_conv_bias + (_in_proj_width(config) + width) * config.use_bias
    weights = layers * (conv * config.conv_kernel + biases + 3 * heads + width + inner) + (mlps + 1) * width
    weights += width * config.vocab_size
    states = layers * (conv * config.conv_kernel + inner * state)
    potentials = (layers * (width + inner) + mlps * (width + gated)) * config.states_per_neuron
    activations = layers * (
        width  # norm: in; what comes out is the projection's input, as below
        + 3 * width  # residual: both operands and the sum
        + 2 * conv
        + conv + heads + inner  # scan: x, B, C and dt in, y out
        + 2 * inner  # gated norm: y and z in
    )  # fmt: skip
    activations += mlps * (width + 3 * width + 2 * gated)  # norm, residual, gate and upper half in
    activations += 2 * width + 2 * width + width + config.vocab_size  # embedding, last norm, head
    return {
        "rest": weights / (batch * length) + 2 * states / length + activations,
        "neurons": shifts(config) / (batch * length) + 2 * potentials / length,  # what only a spiking one has
    }


def shifts(config: SpikingMambaConfig) -> int:
    """How many levels shifted inputs have, and constants their outputs: each is added once a token."""
    return sum(map(sum, sizes(config))) if config.shift_inputs else 0


def sizes(config: SpikingMambaConfig) -> list[tuple[int, int]]:
    """``(in_features, out_features)`` of every projection."""
    width, gated = config.hidden_size, _gated(config)
    sizes = {
        "mamba": [(width, _in_proj_width(config)), (_inner(config), width)],
        "mlp": [(width, 2 * gated), (gated, width)],
    }
    return [size for i in range(config.num_hidden_layers) for size in sizes[config.block_type(i)]]
