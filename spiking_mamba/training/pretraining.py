"""Pretraining of a small dense Mamba2, to be distilled later."""

from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import Field
from transformers import Trainer, TrainingArguments, set_seed
from transformers.activations import ACT2FN

from spiking_mamba import data
from spiking_mamba.common.files import file_sha256
from spiking_mamba.common.interruption import interruptible
from spiking_mamba.common.provenance import provenance
from spiking_mamba.common.schema import (
    Auto,
    Count,
    Keys,
    Name,
    Positive,
    Seed,
    Sources,
    schema,
    schema_of,
)
from spiking_mamba.data.tokens import texts_of
from spiking_mamba.model.configuration import SpikingMambaConfig
from spiking_mamba.model.modeling import SpikingMambaForCausalLM
from spiking_mamba.model.tokenizer import load_tokenizer
from spiking_mamba.training.arguments import Training, autocast, compile_blocks, training_arguments
from spiking_mamba.training.head_loss import head_loss
from spiking_mamba.training.rows import check_rows, collate, training_text
from spiking_mamba.training.run import finish_run, kept_in, run, run_folder, whole_model
from spiking_mamba.training.student import Compensation, Length, Membrane, Neuron, Threshold

__all__ = ["PretrainingSettings", "PretrainingTrainer", "pretrain"]


class PretrainingTrainer(Trainer):
    """transformers' ``Trainer``, whose next-token loss never holds the logits of a whole batch.

    Inputs need ``input_ids`` and ``labels`` ``[B, L]``, where -100 is ignored; ``seq_idx`` may say where
    documents begin.
    """

    model: SpikingMambaForCausalLM
    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # One position's logits only: the loss makes the others itself, a piece at a time.
        output = model(
            inputs["input_ids"],
            seq_idx=inputs.get("seq_idx"),
            output_hidden_states=True,
            logits_to_keep=1,
            use_cache=False,
        )
        targets = inputs["labels"][:, 1:]
        counted = targets != -100
        hidden = output.hidden_states[-1][:, :-1][counted]
        with autocast(self):
            loss, _ = head_loss(
                hidden, self.model.lm_head.weight, targets=targets[counted], compiles=self.model.compiles
            )
        return (loss, output) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        compiles = self.model.compiles
        self.model.compile_blocks(False)  # compiling takes longer than the few batches of an evaluation
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.model.compile_blocks(compiles)


_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_heads",
    "head_dim",
    "n_groups",
    "state_size",
    "conv_kernel",
)
_MODEL: dict[str, Any] = {
    **dict.fromkeys((*_SIZES, "expand", "chunk_size"), Count),
    **dict.fromkeys(("layer_norm_epsilon", "initializer_range"), Positive),
    **dict.fromkeys(("time_step_min", "time_step_max", "time_step_floor"), Positive),
    "time_step_rank": Count | Literal["auto"],
    "time_step_limit": Annotated[list[float], Field(min_length=2, max_length=2)],
    "hidden_act": Literal[tuple(ACT2FN)],
    "intermediate_size": Count | None,
    "neuron": Neuron | None,
    "sgc": Compensation | None,
    "membrane": Membrane,
    "threshold": Threshold,
}
_OTHERS = (
    *("use_bias", "use_conv_bias", "residual_in_fp32", "rescale_prenorm_residual"),
    *("tie_word_embeddings", "learn_threshold", "shift_inputs", "layers_block_type"),
)
_Model = schema_of(SpikingMambaConfig, (*_MODEL, *_OTHERS), _MODEL, "model")


@schema
class PretrainingSettings:
    """Settings of one pretraining; every field is a key of the YAML file.

    Attributes:
        output: folder of the run: settings, checkpoints, log, and in ``model/`` the model and
            ``training.json``, which says how it came to be.
        data: text, see ``spiking_mamba.data.load_text``; without ``held_out`` its train split.
        held_out: text whose loss goes into the log every ``training.eval_steps``; null for none.
        length: tokens per row.
        vocab_size: entries of the byte-level BPE that is trained on the text.
        decontaminate: leave out documents that share 13 words in a row with what is evaluated, see
            ``spiking_mamba.data.contamination``; their number is printed.
        separate_documents: start afresh where a document begins within a row; false: the model sees what
            stands before it.
        tokenizer: folder or hub name of a tokenizer to use instead; null to train one.
        model: fields of ``SpikingMambaConfig``.
        training: fields of transformers' ``TrainingArguments``; ``bf16: auto`` where it pays.
        save_dtype: of the exported weights, ``float32`` or ``bfloat16``; checkpoints are float32.
        seed: of the weights, the data order and every random generator.
        compile: run the blocks through ``torch.compile``: true, false, or auto, which means on a GPU.
        resume: go on with the run in ``output``.
        overwrite: throw away the run in ``output``.
    """

    output: Name
    data: Sources = field(default_factory=lambda: ["wikipedia-leads", "state-of-the-union"])
    length: Length = 256
    vocab_size: Annotated[int, Field(gt=256, le=2**20)] = 4096
    decontaminate: bool = True
    separate_documents: bool = True
    tokenizer: Name | None = None
    held_out: Sources | None = None
    model: Annotated[dict[str, Any], Keys(_Model)] = field(default_factory=dict)
    training: Training = field(default_factory=dict)
    compile: Auto = "auto"
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    seed: Seed = 0
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.model:
            self.make_config(self.vocab_size, 0)

    def make_config(self, vocab_size: int, end: int) -> SpikingMambaConfig:
        """The model's configuration; the number of heads follows from the widths.

        Args:
            vocab_size: entries of the tokenizer.
            end: id of the end-of-text token.
        """
        checked = _Model(**self.model)  # whose numbers are what the configuration takes
        given = {key: getattr(checked, key) for key in self.model}
        fields = {"head_dim": 32, "n_groups": 1, "expand": 2, "tie_word_embeddings": True} | given
        if "hidden_size" not in fields:
            raise ValueError("model must set hidden_size.")
        fields.setdefault("num_heads", fields["hidden_size"] * fields["expand"] // fields["head_dim"])
        try:
            return SpikingMambaConfig(
                vocab_size=vocab_size, bos_token_id=end, eos_token_id=end, pad_token_id=end, **fields
            )
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise ValueError(f"model: {error}") from error

    def make_arguments(self) -> TrainingArguments:
        evaluation = {} if self.held_out is None else {"eval_strategy": "steps"}
        evaluates = self.held_out is not None
        return training_arguments(
            Path(self.output), evaluation | self.training, self.seed, evaluates=evaluates
        )


def pretrain(settings: PretrainingSettings) -> tuple[Path, list[dict[str, float]]]:
    """Pretrain a dense model as the settings say.

    Returns:
        The model's folder, and the log's rows.

    Raises:
        RunError, DataError, ValueError: before anything is written or trained.
    """
    set_seed(settings.seed)
    settings.make_config(settings.vocab_size, 0)  # what is wrong with it is said before text is read
    split = "train" if settings.held_out is None else None
    text = training_text(settings.data, split, settings.decontaminate)
    if settings.tokenizer is None:
        tokenizer = data.train_tokenizer(text["text"], settings.vocab_size)
    else:
        tokenizer = load_tokenizer(settings.tokenizer)
    config = settings.make_config(len(tokenizer), tokenizer.eos_token_id)
    arguments = settings.make_arguments()
    rows = data.tokenize(text, tokenizer, settings.length)
    check_rows(rows, arguments, config.vocab_size)
    held_out = None
    if settings.held_out is not None:
        held_out_text = data.load_text(settings.held_out)
        if not set(texts_of(held_out_text)).isdisjoint(texts_of(text)):
            raise data.DataError("Documents of held_out stand in data, too.")
        held_out = data.tokenize(held_out_text, tokenizer, settings.length)
    model = SpikingMambaForCausalLM(config)
    compile_blocks(settings.compile, model)
    end = tokenizer.eos_token_id if settings.separate_documents else None
    with (
        interruptible(lambda: kept_in(Path(settings.output))),
        run_folder(settings, settings.resume, settings.overwrite) as folder,
    ):
        trainer = PretrainingTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=held_out,
            data_collator=partial(collate, end_of_text=end),
        )
        history = run(trainer, settings.resume)
        sources = [settings.data] if isinstance(settings.data, str) else list(settings.data)
        tokens = trainer.state.global_step * arguments.train_batch_size * arguments.world_size
        tokens *= arguments.gradient_accumulation_steps * settings.length
        record = provenance(settings) | {
            "gpus_or_processes": arguments.world_size,
            "parameters": sum(p.numel() for p in model.parameters()),
            "corpus_tokens": len(rows) * settings.length,
            "tokens_seen": tokens,
            "epochs": tokens / (len(rows) * settings.length),
            "data_sha256": {name: file_sha256(Path(name)) for name in sources if Path(name).is_file()},
        }
        trained = whole_model(trainer)
        if trained is not None:
            trained.to(getattr(torch, settings.save_dtype))
        return finish_run(trained, tokenizer, folder, record=record), history
