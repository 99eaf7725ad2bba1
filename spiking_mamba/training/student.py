"""Types of the settings that say what a student is, and what can be said of them without its teacher."""

import functools
import json
from typing import Annotated, Any

from pydantic import AfterValidator, Field

import neurons
from spiking_mamba.common.schema import Positive, SettingsError, Words, schema
from spiking_mamba.model.configuration import Membrane, SpikingMambaConfig

__all__ = ["Compensation", "Length", "Membrane", "Neuron", "Threshold", "check_student"]


@schema
class _Calibration:
    """A threshold that is calibrated.

    Attributes:
        mean_abs: the mean ``|s|`` that is wanted.
    """

    mean_abs: Positive


def _check_neuron(spec: dict[str, Any]) -> dict[str, Any]:
    try:
        neurons.build(spec)
    except (TypeError, ValueError) as error:
        raise ValueError(f"cannot be made: {error}") from error
    return spec


Length = Annotated[int, Field(ge=2, lt=2**31)]
Neuron = Annotated[
    dict[str, Any], AfterValidator(_check_neuron), Words("a mapping, {class: a name, args: a mapping}")
]
Compensation = Annotated[dict[str, Any], Words("a mapping of mode, function, lam and schedule")]
Threshold = Annotated[
    int | float | dict[str, Any] | list[Any],
    Words("a positive number, {in_proj: number, out_proj: number}, a list of such, or {mean_abs: number}"),
]


def check_student(
    neuron: Any, sgc: Any, membrane: str, threshold: Any, learn_threshold: bool, shift_inputs: bool
) -> None:
    """Raise a ValueError for what no student can be, whatever its teacher."""
    _check_student(json.dumps([neuron, sgc, membrane, threshold, learn_threshold, shift_inputs]))


@functools.lru_cache(maxsize=256)  # of a study's rows many are alike
def _check_student(asked: str) -> None:
    neuron, sgc, membrane, threshold, learn_threshold, shift_inputs = json.loads(asked)
    if isinstance(threshold, dict) and "mean_abs" in threshold:
        try:
            _Calibration(**threshold)
        except SettingsError as error:
            raise SettingsError("threshold", [each.within("threshold") for each in error.problems]) from None
        if neuron is None:
            raise ValueError("threshold: a student without neurons has none to calibrate.")
        threshold = 1.0
    layers = len(threshold) if isinstance(threshold, list) else 1
    if not layers:
        raise ValueError("threshold must list every layer's, got [].")
    try:
        SpikingMambaConfig(
            vocab_size=8,
            hidden_size=4,
            num_heads=2,
            head_dim=4,
            n_groups=1,
            state_size=4,
            num_hidden_layers=layers,
            neuron=neuron,
            sgc=sgc,
            membrane=membrane,
            threshold=threshold,
            learn_threshold=learn_threshold,
            shift_inputs=shift_inputs,
        )
    except TypeError as error:
        raise ValueError(str(error)) from error
