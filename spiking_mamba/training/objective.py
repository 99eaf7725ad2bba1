"""What ``objective`` may say of a preference optimisation: trl's own arguments of the method, typed."""

import dataclasses
import functools
from typing import Annotated, Any, Literal

from pydantic import Field
from transformers import TrainingArguments

from spiking_mamba.common.keys import reject_unknown_keys
from spiking_mamba.common.schema import Count, Fraction, Positive, SettingsError, as_list, schema_of
from spiking_mamba.common.words import hints_of

__all__ = ["check_objective"]

# What a setting decides, or what trl does to rows that it gets as text.
_DECIDED = {"max_length", "precompute_ref_log_probs", "model_init_kwargs", "trust_remote_code"}
_DECIDED |= {"truncation_mode", "dataset_num_proc", "pad_token", "padding_free", "use_liger_kernel"}
_LOSSES = {
    "dpo": (
        *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"),
        *("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
    ),
    "kto": ("kto", "apo_zero_unpaired"),
}
_DIVERGENT = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
_OBJECTIVE: dict[str, Any] = {
    "f_divergence_type": Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"],
    "loss_weights": list[Annotated[float, Field(ge=0)]] | None,
    "pad_to_multiple_of": Count | Literal["auto"] | None,
    "beta": Positive,
    **dict.fromkeys(("desirable_weight", "undesirable_weight", "discopop_tau"), Positive),
    **dict.fromkeys(("label_smoothing", "ref_model_mixup_alpha", "f_alpha_divergence_coef"), Fraction),
    **dict.fromkeys(("ld_alpha", "router_aux_loss_coef"), Fraction | None),
    **dict.fromkeys(("precompute_ref_batch_size",), Count | None),
    "ref_model_sync_steps": Count,
}


@functools.cache
def _objective_of(method: str, config: type) -> type:
    """The schema of a method's ``objective``; ``config`` is the class of trl's arguments."""
    trainers = {f.name for f in dataclasses.fields(TrainingArguments)}
    own = [f.name for f in dataclasses.fields(config) if f.init and f.name not in _DECIDED | trainers]
    loss: Any = Literal[_LOSSES[method]]
    kinds = _OBJECTIVE | {
        "loss_type": loss if method == "kto" else loss | Annotated[list[loss], Field(min_length=1)]
    }
    return schema_of(config, own, kinds, "objective")


def check_objective(method: str, config: type, given: dict[str, Any]) -> None:
    """Raise a ValueError for what trl would refuse later, or pass over.

    Args:
        method: 'dpo' or 'kto'.
        config: the class of trl's arguments that ``given`` goes to.
        given: the recipe's ``objective``.
    """
    known = _objective_of(method, config)
    reject_unknown_keys(given, hints_of(known), "objective")
    try:
        known(**given)
    except SettingsError as error:
        raise SettingsError("objective", [each.within("objective") for each in error.problems]) from None
    losses = as_list(given.get("loss_type"))
    weights = given.get("loss_weights")
    if weights is not None and len(weights) != max(1, len(losses)):
        raise ValueError(f"objective.loss_weights must be one for each loss_type, got {len(weights)}.")
    if "exo_pair" in losses and not given.get("label_smoothing"):
        raise ValueError("objective.label_smoothing must be above 0 for the loss_type exo_pair.")
    if given.get("f_divergence_type", "reverse_kl") != "reverse_kl" and not _DIVERGENT.issuperset(losses):
        raise ValueError(
            f"objective.f_divergence_type goes with loss_type {', '.join(sorted(_DIVERGENT))} alone."
        )
    if given.get("use_weighting") and {"aot", "aot_unpaired"}.intersection(losses):
        raise ValueError("objective.use_weighting does not go with the loss_type aot or aot_unpaired.")
