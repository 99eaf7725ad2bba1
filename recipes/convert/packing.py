"""Mixers in few bits: integers, a scale for every output or group of inputs, and errors fed back.

Rounding a row of weights to integers one input after the other, each error can be made good by the inputs
that are still to come, as far as inputs go together: with ``H`` the mean of ``x x^T`` over the layer's inputs
``x``, that is optimal brain quantisation in a fixed order (Frantar et al., arXiv 2210.17323). Without ``H``
every weight is rounded by itself.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rounding import scales_of
from safetensors.torch import save_file

from spiking_mamba import SpikingMambaForCausalLM
from spiking_mamba.common.checkpoint_files import MIXERS
from spiking_mamba.common.files import file_sha256, refuse_file, share_weights, write_whole
from spiking_mamba.model.converted import mixers_of
from spiking_mamba.model.modes import hooked

__all__ = ["integers", "pack_mixers", "second_moments"]


@torch.no_grad()
def integers(
    weight: torch.Tensor, bits: int = 8, group: int = 0, second_moment: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers and scales of which ``integers * scale`` comes near the weight.

    Args:
        weight: ``[out, in]``. bits: 2 to 8.
        group: inputs that share a scale; it divides ``in``; 0: all.
        second_moment: ``[in, in]``, the inputs' mean ``x x^T``, for feeding errors back.

    Returns:
        int8 ``[out, in]`` in ``+-(2^(bits-1) - 1)``, and float32 ``[out, in / group]`` of float16's values.
    """
    weight = weight.detach().float().clone()
    inputs, most = weight.shape[1], 2 ** (bits - 1) - 1
    group = group or inputs
    scale = scales_of(weight, bits, group)
    wide = scale.repeat_interleave(group, dim=1)
    if second_moment is None:
        return (weight / wide).round().clamp(-most, most).to(torch.int8), scale
    upper = _feedback(second_moment)
    rounded = torch.empty_like(weight)
    for start in range(0, inputs, 64):  # the errors of a block reach the blocks behind it in one product
        end = min(start + 64, inputs)
        errors = torch.empty_like(weight[:, start:end])
        for k in range(start, end):
            rounded[:, k] = (weight[:, k] / wide[:, k]).round().clamp(-most, most)
            error = (weight[:, k] - rounded[:, k] * wide[:, k]) / upper[k, k]
            weight[:, k:end] -= error[:, None] * upper[k, k:end]
            errors[:, k - start] = error
        weight[:, end:] -= errors @ upper[start:end, end:]
    return rounded.to(torch.int8), scale


def _feedback(second_moment: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse, its diagonal damped by 1%."""
    matrix = second_moment.double()
    matrix = matrix + 0.01 * matrix.diagonal().mean() * torch.eye(len(matrix), device=matrix.device).double()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _nibbles(values: torch.Tensor) -> torch.Tensor:
    """Two integers of 4 bits in a byte, the first in the lower half."""
    shifted = (values.flatten() + 8).to(torch.uint8)
    return shifted[::2] | (shifted[1::2] << 4)


def _packed(
    model: SpikingMambaForCausalLM, bits: int, group: int, moments: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of all mixers by name: matrices as integers and scales in float16, the rest in float32."""
    for number, mixer in enumerate(mixers_of(model)):
        for name, parameter in mixer.named_parameters():
            key = f"{number}.{name}"
            value = parameter.detach().float().cpu()
            if parameter.ndim != 2:
                yield key, value
                continue
            moment = moments.get(f"{number}.{name.removesuffix('.weight')}")
            whole, scale = integers(parameter.detach(), bits, group, moment)
            yield f"{key}:scale", scale.half().cpu()
            if bits <= 4:
                yield f"{key}:nibbles", _nibbles(whole.cpu())
            else:
                yield f"{key}:integers", whole.cpu()


@torch.no_grad()
def second_moments(
    model: SpikingMambaForCausalLM, ids: torch.Tensor, rows: int = 4
) -> dict[str, torch.Tensor]:
    """The mean ``x x^T`` of what every projection of every mixer is given, by name: "0.in_proj" and so on.

    Args:
        model: dense.
        ids: ``[B, L]``; first places are left out, as in training. rows: that go through the model at a time.
    """
    sums: dict[str, torch.Tensor] = {}

    def add(name: str) -> Any:
        def hook(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0][:, 1:].flatten(0, 1).float()
            sums[name] = sums.get(name, 0) + x.T @ x

        return hook

    handles = [
        getattr(mixer, name).register_forward_pre_hook(add(f"{number}.{name}"))
        for number, mixer in enumerate(mixers_of(model))
        for name in ("in_proj", "out_proj")
    ]
    with hooked(handles):
        for part in ids.split(rows):
            model.backbone(part, use_cache=False)
    return {name: total / (ids.shape[0] * (ids.shape[1] - 1)) for name, total in sums.items()}


def pack_mixers(
    model: SpikingMambaForCausalLM,
    folder: str | Path,
    source: str,
    bits: int = 8,
    group: int = 0,
    moments: dict[str, torch.Tensor] | None = None,
    megabytes: float = 15.0,
    facts: dict[str, Any] | None = None,
    more: dict[str, dict[str, torch.Tensor]] | None = None,
) -> list[Path]:
    """Write a model's mixers into files of at most so many megabytes, its configuration, and an index.

    As :func:`spiking_mamba.model.converted.read_converted` reads them.

    Args:
        model: of mixers and MLPs. folder: to write into.
        source: of everything else, see :func:`spiking_mamba.model.source.load_source`.
        bits, group: see :func:`integers`; at most 4 bits are stored two in a byte.
        moments: inputs' second moments by projection, "0.in_proj" and so on, see :func:`integers`.
        facts: more to stand in the index.
        more: other files' tensors, by the files' names.
        megabytes: the most that a file holds.

    Returns:
        The files, the index first.
    """
    folder = Path(folder)
    refuse_file(folder)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in _packed(model, bits, group, moments or {}):
        bytes_ = tensor.numel() * tensor.element_size()
        if size + bytes_ > megabytes * 2**20 and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += bytes_
    folder.mkdir(parents=True, exist_ok=True)
    mixers = {f"mixers-{k:02d}.safetensors": shard for k, shard in enumerate(shards)}
    paths = []
    for name, tensors in (mixers | (more or {})).items():
        paths.append(folder / name)
        draft = paths[-1].with_suffix(".part")
        save_file(tensors, draft)
        draft.replace(paths[-1])
    model.config.save_pretrained(folder)
    share_weights(folder)
    index = {
        "source": source,
        "bits": bits,
        "files": list(mixers),
        "sha256": {path.name: file_sha256(path) for path in paths},
    } | (facts or {})
    write_whole(folder / MIXERS, json.dumps(index, indent=1) + "\n")
    return [folder / MIXERS, *paths]
