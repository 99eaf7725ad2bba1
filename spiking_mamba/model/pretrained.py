"""Weights, initialisation and loading of the spiking Mamba2."""

import copy
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from spiking_mamba.common.checkpoint_files import (
    INDEX,
    MIXERS,
    WEIGHTS,
    Header,
    check_layers,
    check_links,
    read_headers,
    read_mapping,
)
from spiking_mamba.common.errors import CheckpointError
from spiking_mamba.common.files import share_weights
from spiking_mamba.model.block import SpikingMambaMixer
from spiking_mamba.model.by_hand import set_by_hand
from spiking_mamba.model.configuration import SpikingMambaConfig
from spiking_mamba.model.projection import ENDS, SpikeEncoder
from spiking_mamba.model.spike_fed import FIRST_FORM

__all__ = ["OWN_IN_FLOAT32", "SpikingMambaPreTrainedModel"]

_UNFIT = "The checkpoint does not fit its configuration: "


def _check_sizes(cls: type, folder: Path, config: Any, renamed: dict[str, str]) -> None:
    """Raise a CheckpointError before memory is taken for weights that the folder's files do not hold.

    Or hold as integers, booleans or complex numbers, which loading would cast.
    """
    if not any((folder / name).is_file() or (folder / (name + INDEX)).is_file() for name in WEIGHTS):
        if (folder / MIXERS).is_file():
            raise CheckpointError(
                f"{folder} holds packed mixers, which spiking_mamba.model.checkpoint.load_model reads."
            )
        return  # what transformers says of that is clear
    if (folder / "config.json").is_file() and "ssm_cfg" in read_mapping(folder / "config.json"):
        raise CheckpointError(f"{folder} is in the form of state-spaces, which from_dense() reads.")
    check_links(folder)
    headers = read_headers(folder)
    config = cls.config_class.from_pretrained(folder) if config is None else config  # type: ignore[attr-defined]
    check_layers(folder, {"num_hidden_layers": config.num_hidden_layers})
    with torch.device("meta"):
        expected = cls(copy.deepcopy(config)).state_dict()
    matched: dict[str, Header] = {}
    for key, header in headers.items():
        for old, new in renamed.items():
            key = re.sub(old, new, key)
        prefixed = (key, f"{cls.base_model_prefix}.{key}", key.removeprefix(f"{cls.base_model_prefix}."))  # type: ignore[attr-defined]
        matched |= {name: header for name in prefixed if name in expected}
    larger = [k for k, h in matched.items() if expected[k].numel() > math.prod(h.shape)]
    if larger:
        raise CheckpointError(f"{_UNFIT}mismatched keys: {', '.join(sorted(larger)[:5])}")
    absent = [key for key in expected if key not in matched]
    if sum(expected[key].numel() for key in absent) > sum(math.prod(h.shape) for h in headers.values()):
        raise CheckpointError(f"{_UNFIT}missing keys: {', '.join(sorted(absent)[:5])}")
    for key, header in matched.items():
        if expected[key].is_floating_point() and not header.floating:
            raise CheckpointError(f"{folder}: {key} is of type {header.dtype}, no floating-point weight.")


# the parameters that a spiking model has and a dense one has not, but for its neurons'
OWN_IN_FLOAT32 = ("log_threshold", "level", "constant")


class SpikingMambaPreTrainedModel(PreTrainedModel):
    """Weights, initialisation and loading of the spiking Mamba2."""

    config: SpikingMambaConfig
    config_class = SpikingMambaConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SpikingMambaBlock"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = set(OWN_IN_FLOAT32)  # noqa: RUF012
    # weights of another head than theirs
    _new_in_checkpoints_of_others: ClassVar[frozenset[str]] = frozenset()
    _is_stateful = True  # no way back from a state: generate() refuses what would crop it

    if TYPE_CHECKING:  # transformers' own is wrapped in what hides its signature

        def to(self, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
            """As of any module."""

    def __setattr__(self, name: str, value: Any) -> None:
        """As of any module; of two tied layers, one that an adapter takes gets a weight of its own.

        PEFT merges an adapter into its layer's weight in place, and the other layer would change with it.
        """
        super().__setattr__(name, value)
        adapted = (
            name in ENDS and isinstance(value, nn.Module) and "base_layer" in dict(value.named_children())
        )
        if adapted and self.config.tie_word_embeddings:
            base = value.get_base_layer()
            base.weight = copy.deepcopy(base.weight)
            self.config.tie_word_embeddings = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Mamba2's initial values, but thresholds as configured."""
        super()._init_weights(module)
        if isinstance(module, SpikingMambaMixer):
            module.initialise(self.config, torch.rand(module.num_heads, device=module.dt_bias.device))
            init.kaiming_uniform_(module.conv1d.weight, a=math.sqrt(5))
            if module.conv1d.bias is not None:
                init.zeros_(module.conv1d.bias)
            init.kaiming_uniform_(module.out_proj.weight, a=math.sqrt(5))
            if self.config.rescale_prenorm_residual:  # as GPT-2: the residual stream sums as many of them
                module.out_proj.weight /= math.sqrt(self.config.num_hidden_layers)
        if isinstance(module, SpikeEncoder):
            module.reset_parameters()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; neurons and V_th that were set by hand go into the configuration first.

        Raises:
            TypeError, ValueError: the configuration has no place for them, see :func:`.by_hand.set_by_hand`.
            NotADirectoryError: there is a file of that name.
        """
        folder = Path(args[0] if args else kwargs["save_directory"])
        if folder.is_file():  # transformers would only log it
            raise NotADirectoryError(f"{folder} is a file; a folder is wanted.")
        for key, value in set_by_hand(self, self.config).items():
            setattr(self.config, key, value)
        # or names of the first form, if it was loaded from them
        super().save_pretrained(*args, **{"save_original_format": False} | kwargs)
        share_weights(folder)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any):
        """As in transformers, but a checkpoint that lacks or adds a weight is an error, not a warning.

        A head that another kind of model does not have is new.

        Raises:
            ValueError: a key is missing or unexpected, or a shape disagrees with the config.
        """
        kwargs["key_mapping"] = FIRST_FORM | (kwargs.get("key_mapping") or {})
        if args and isinstance(args[0], str | Path) and Path(args[0]).is_dir() and "subfolder" not in kwargs:
            _check_sizes(cls, Path(args[0]), kwargs.get("config"), kwargs["key_mapping"])
        loaded = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = cast("tuple[Self, dict[str, Any]]", loaded)
        problems = {
            key: sorted(map(str, info[key]))
            for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
            if info.get(key)
        }
        if cls.__name__ not in (model.config.architectures or ()):
            new = [
                key
                for key in problems.get("missing_keys", ())
                if key not in cls._new_in_checkpoints_of_others
            ]
            problems = {k: v for k, v in (problems | {"missing_keys": new}).items() if v}
        if problems:
            raise ValueError(
                _UNFIT + "; ".join(f"{k.replace('_', ' ')}: {', '.join(v[:5])}" for k, v in problems.items())
            )
        return (model, info) if output_loading_info else model
