"""The checkpoint form of state-spaces: what mamba-ssm's ``MambaLMHeadModel`` reads and writes.

It differs from transformers' in one name (``backbone.embedding``), in the padding of the vocabulary, and in
``config.json``, whose keys are the fields of ``mamba_ssm.models.config_mamba.MambaConfig``; those of its
``ssm_cfg`` are the arguments of ``mamba_ssm.modules.mamba2.Mamba2``.
"""

import math
from pathlib import Path
from typing import Any

import torch

from spiking_mamba.common.checkpoint_files import Weights
from spiking_mamba.common.keys import reject_unknown_keys
from spiking_mamba.model.configuration import SpikingMambaConfig

__all__ = ["PUBLISHED", "from_state_spaces", "published_config", "to_state_spaces"]

# Layers and width of the dense models of state-spaces; the rest they have in common.
PUBLISHED = {
    "state-spaces/mamba2-130m": (24, 768),
    "state-spaces/mamba2-370m": (48, 1024),
    "state-spaces/mamba2-780m": (48, 1536),
    "state-spaces/mamba2-1.3b": (48, 2048),
    "state-spaces/mamba2-2.7b": (64, 2560),
}


# Keys that change the model in ways that transformers' Mamba2 has not, and the values that do not.
_FIXED = {
    "d_intermediate": (0, None),
    "attn_layer_idx": ([], None),
    "attn_cfg": ({}, None),
    "rms_norm": (True,),
}
_FIXED_SSM = {
    "layer": ("Mamba2",),
    "d_ssm": (None,),
    "D_has_hdim": (False,),
    "rmsnorm": (True,),
    "norm_before_gate": (False,),
    "process_group": (None,),
}
_READ = "d_model n_layer vocab_size ssm_cfg residual_in_fp32 tie_embeddings"
_READ_SSM = "d_state d_conv expand headdim ngroups dt_limit bias conv_bias chunk_size"
# Speed, initial values, or names: nothing of a trained model depends on them.
_IDLE = "fused_add_norm pad_vocab_size_multiple architectures torch_dtype dtype transformers_version"
_IDLE_SSM = "use_mem_eff_path sequence_parallel conv_init A_init_range dt_min dt_max dt_init_floor"

_EPSILON = 1e-5  # mamba-ssm's, of every norm


def _refuse_unsupported(given: dict, fixed: dict, others: str, where: str) -> None:
    reject_unknown_keys(given, (*fixed, *others.split()), where)
    for key, allowed in fixed.items():
        if key in given and given[key] not in allowed:
            raise ValueError(f"{where}: {key} is {given[key]!r}; only {allowed[0]!r} is supported.")


def _dt_limit(ssm: dict[str, Any]) -> tuple[float, float]:
    limit = ssm.get("dt_limit", (0.0, math.inf))
    try:
        low, high = map(float, limit)
    except (TypeError, ValueError) as error:
        raise ValueError(f"ssm_cfg: dt_limit is {limit!r}, not two numbers.") from error
    if not 0.0 <= low < high:
        raise ValueError(f"ssm_cfg: dt_limit is {limit!r}; it needs 0 <= low < high.")
    return low, high


def _state_size(ssm: dict[str, Any], width: int) -> tuple[int, int]:
    """Groups and state size; the weights know their product only, ``width``."""
    groups = ssm.get("ngroups", 1)
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1 or width % groups:
        raise ValueError(f"ssm_cfg: ngroups is {groups!r}, but the weights of B have {width} rows.")
    state_size = ssm.get("d_state", width // groups)
    if state_size != width // groups:
        raise ValueError(
            f"ssm_cfg: ngroups {groups} and d_state {state_size!r} do not fit the weights of B, "
            f"which have {width} rows."
        )
    return groups, state_size


def from_state_spaces(settings: dict[str, Any], weights: Weights) -> tuple[SpikingMambaConfig, Weights]:
    """Configuration and weights of a dense model, in transformers' form.

    Where the weights' shapes settle a value they are trusted above ``config.json``: some published files
    disagree with their weights. The vocabulary is the weights', padding included.

    Args:
        settings: the content of ``config.json``.
        weights: the state dict.

    Raises:
        KeyError: a weight that gives a size is missing.
        ValueError: a key of the settings that is unknown, or whose value cannot be had here.
    """
    ssm = settings["ssm_cfg"]
    if not isinstance(ssm, dict):
        raise ValueError(f"config.json: ssm_cfg is {ssm!r}, no mapping.")
    _refuse_unsupported(settings, _FIXED, f"{_READ} {_IDLE}", "config.json")
    _refuse_unsupported(ssm, _FIXED_SSM, f"{_READ_SSM} {_IDLE_SSM}", "ssm_cfg")

    weights = {key.replace("backbone.embedding.", "backbone.embeddings."): w for key, w in weights.items()}
    layer = "backbone.layers.0.mixer."
    embeddings = weights["backbone.embeddings.weight"]
    vocab_size, hidden_size = embeddings.shape
    intermediate_size = weights[layer + "out_proj.weight"].shape[1]
    conv_dim, _, conv_kernel = weights[layer + "conv1d.weight"].shape
    (num_heads,) = weights[layer + "A_log"].shape
    if intermediate_size % hidden_size or intermediate_size % num_heads:
        raise ValueError(f"{intermediate_size} channels fit neither {hidden_size} nor {num_heads} heads.")
    n_groups, state_size = _state_size(ssm, (conv_dim - intermediate_size) // 2)
    tied = settings.get("tie_embeddings", True)
    if (head := weights.get("lm_head.weight")) is not None:
        tied = torch.equal(head, embeddings)
    elif tied:
        weights["lm_head.weight"] = embeddings
    config = SpikingMambaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=1 + max(int(k.split(".")[2]) for k in weights if k.startswith("backbone.layers.")),
        expand=intermediate_size // hidden_size,
        num_heads=num_heads,
        head_dim=intermediate_size // num_heads,
        n_groups=n_groups,
        state_size=state_size,
        conv_kernel=conv_kernel,
        chunk_size=ssm.get("chunk_size", 256),
        time_step_limit=_dt_limit(ssm),
        use_bias=layer + "in_proj.bias" in weights,
        use_conv_bias=layer + "conv1d.bias" in weights,
        layer_norm_epsilon=_EPSILON,
        residual_in_fp32=settings.get("residual_in_fp32", True),
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return config, weights


def to_state_spaces(config: SpikingMambaConfig, weights: Weights) -> tuple[dict[str, Any], Weights]:
    """The other way round: the content of ``config.json`` and a state dict for mamba-ssm.

    Raises:
        ValueError: mamba-ssm has no such model.
    """
    if config.number_of_blocks("mlp"):
        raise ValueError("mamba-ssm's Mamba2 has no MLP layers of their own: this model has.")
    if config.layer_norm_epsilon != _EPSILON:
        raise ValueError(
            f"mamba-ssm's norms have an epsilon of {_EPSILON}, this model's {config.layer_norm_epsilon}."
        )
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"mamba-ssm's activation is silu, this model's {config.hidden_act}.")
    ssm: dict[str, Any] = {
        "layer": "Mamba2",
        "d_state": config.state_size,
        "d_conv": config.conv_kernel,
        "expand": config.expand,
        "headdim": config.head_dim,
        "ngroups": config.n_groups,
        "bias": config.use_bias,
        "conv_bias": config.use_conv_bias,
        "chunk_size": config.chunk_size,
    }
    if tuple(config.time_step_limit) != (0.0, math.inf):
        ssm["dt_limit"] = list(config.time_step_limit)
    settings = {
        "d_model": config.hidden_size,
        "d_intermediate": 0,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": ssm,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,  # the rows are padded already
        "tie_embeddings": config.tie_word_embeddings,
    }
    weights = {key.replace("backbone.embeddings.", "backbone.embedding."): w for key, w in weights.items()}
    return settings, weights


def published_config(teacher: str) -> SpikingMambaConfig:
    """The configuration that a published name, or the config.json of a transformers folder, stands for."""
    if teacher in PUBLISHED:
        layers, width = PUBLISHED[teacher]
        return SpikingMambaConfig(
            vocab_size=50288,
            hidden_size=width,
            num_hidden_layers=layers,
            num_heads=2 * width // 64,
            n_groups=1,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    if Path(teacher, "config.json").is_file():
        return SpikingMambaConfig.from_pretrained(teacher)
    raise ValueError(f"A dry run knows no {teacher}: give a local folder or one of {', '.join(PUBLISHED)}.")
