"""trl's trainers of DPO and KTO for a spiking or dense model."""

import copy
import dataclasses
from typing import Any, NamedTuple

from transformers import TrainingArguments

from spiking_mamba.model.modeling import SpikingMambaForCausalLM
from spiking_mamba.spikes.counting import count_spikes
from spiking_mamba.training.trainer import SpikingTrainer

try:
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
except ImportError as error:
    raise ImportError('Preference optimisation needs trl: pip install "spiking-mamba[recipes]"') from error

__all__ = ["METHODS", "Method", "SpikingDPOTrainer", "SpikingKTOTrainer", "check_batch_size"]


def _check_reference(reference: str) -> None:
    if reference not in ("copy", "precomputed"):
        raise ValueError(f"reference must be 'copy' or 'precomputed', got {reference!r}.")


class _PreferenceTrainer(SpikingTrainer):
    """What the trainers below add to trl's.

    Args:
        model: spiking or dense; as it is now, it is the reference.
        reference: 'copy' keeps a copy of the model, frozen; 'precomputed' asks the model for the reference's
            log-probabilities before training and keeps those.
        freeze_embeddings: do not train the embeddings (nor a head tied to them).
        others: as in trl. ``train_dataset`` holds token ids, see :func:`pair_rows`.

    Logged beside what trl logs: mean ``|s|`` weighted by output width and SGC's lambda.
    """

    def __init__(
        self,
        model: SpikingMambaForCausalLM,
        reference: str = "copy",
        freeze_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        _check_reference(reference)
        model.eval()  # training mode has SGC's path, which the reference has not
        kwargs["args"] = dataclasses.replace(
            kwargs["args"], precompute_ref_log_probs=reference == "precomputed"
        )
        frozen = copy.deepcopy(model).requires_grad_(False) if reference == "copy" else None
        super().__init__(model, freeze_embeddings, ref_model=frozen, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not (model.training and self._log_due()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with count_spikes(self.student, histogram=False) as spikes:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._note_spikes(spikes)
        return loss

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return dataset  # trl would tokenize here, and leave out and cut rows without a word

    def _send_telemetry(self) -> None:
        pass

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        pass  # trl writes one at every checkpoint, over what the run's folder holds


class SpikingDPOTrainer(_PreferenceTrainer, DPOTrainer):
    """trl's ``DPOTrainer`` for a spiking model; rows have ``prompt_ids, chosen_ids, rejected_ids``."""


class SpikingKTOTrainer(_PreferenceTrainer, KTOTrainer):
    """trl's ``KTOTrainer`` for a spiking model. Rows have ``prompt_ids``, ``completion_ids``, ``label``.

    The KL term compares prompts with the completions of their neighbours in a step's rows, whose order is
    the data set's, as trl asks; trl pairs within one process, here it is within all, so that several
    processes train as one does.
    """

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if not self.calculate_KL:
            return dataset
        completions, size = dataset["completion_ids"][:], args.train_batch_size * args.world_size
        rotated = []
        for start in range(0, len(completions), size):
            rows = completions[start : start + size]
            rotated += [rows[-1], *rows[:-1]]
        return dataset.add_column("KL_completion_ids", rotated)


class Method(NamedTuple):
    """The trainer of a method, and trl's arguments for it."""

    trainer: type[_PreferenceTrainer]
    config: type[TrainingArguments]


METHODS = {"dpo": Method(SpikingDPOTrainer, DPOConfig), "kto": Method(SpikingKTOTrainer, KTOConfig)}


def check_batch_size(arguments: TrainingArguments) -> None:
    """Raise a ValueError for what trl would find out in the trainer."""
    pairs = isinstance(arguments, KTOConfig) and arguments.loss_type == "kto"
    if pairs and arguments.per_device_train_batch_size < 2:
        raise ValueError("training.per_device_train_batch_size must be at least 2 for KTO's KL term.")
