"""The model that lm-eval runs, registered there as ``spiking_mamba``.

import lm_eval, spiking_mamba.evaluation.harness
lm_eval.simple_evaluate(model="spiking_mamba", model_args="pretrained=runs/quickstart/student/model", ...)
"""

import copy
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from spiking_mamba.common.keys import reject_unknown_keys
from spiking_mamba.common.progress import Share
from spiking_mamba.evaluation.tasks import undisturbed
from spiking_mamba.model.checkpoint import load_model
from spiking_mamba.model.tokenizer import check_vocabulary, load_tokenizer

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError('Zero-shot tasks need lm-eval: pip install "spiking-mamba[recipes]"') from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

__all__ = ["SpikingMambaLM"]

_PASSED_ON = (
    *("max_length", "logits_cache", "softmax_dtype", "max_batch_size", "add_bos_token", "prefix_token_id"),
    *("think_end_token", "enable_thinking", "chat_template_args"),
)


def _without_zeros(tokens: list[int]) -> tuple[int, ...]:
    """``tokens`` without the zeros that they end in."""
    length = len(tokens)
    while length and tokens[length - 1] == 0:
        length -= 1
    return tuple(tokens[:length])


@register_model("spiking_mamba")
class SpikingMambaLM(HFLM):
    """lm-eval's ``HFLM`` for any Mamba2 checkpoint, spiking or dense, in any form that ``load_model`` reads.

    Padding is to the right, and the model is told of it by ``attention_mask``, so that whoever counts spikes
    can leave it out. Log-probabilities are float32.

    Args:
        pretrained: a folder, a hub name, or a model, which stays on the device that it is on.
        tokenizer: a folder, a hub name or a tokenizer; by default that of the checkpoint.
        dtype: 'float32', or 'bfloat16' for autocast; the weights stay as they are.
        device: of a model named by ``pretrained``; by default CUDA where there is one.
        batch_size: requests a forward pass.
        options: others of ``HFLM``: ``max_length``, ``logits_cache``, ``add_bos_token`` ...

    Raises:
        CheckpointError: no model or no tokenizer can be loaded, or they do not belong together.
        ValueError: an unknown option or dtype.
    """

    def __init__(
        self,
        pretrained: str | Path | torch.nn.Module,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int = 16,
        **options: Any,
    ) -> None:
        reject_unknown_keys(options, _PASSED_ON, "model_args")
        dtype = {"auto": "float32"}.get(dtype, dtype)
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}.")
        model: Any = pretrained
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            if not isinstance(pretrained, str | Path):
                raise ValueError("A model in memory needs a tokenizer.")
            tokenizer = load_tokenizer(pretrained, tokenizer)
        if isinstance(pretrained, str | Path):
            model = load_model(pretrained)
            model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        check_vocabulary(tokenizer, model)
        # lengths of inputs whose last token is id 0 itself, by what stands before their last zeros
        self._ending_in_zero: dict[tuple[int, ...], int] = {}
        self.share: Share | None = None  # told how far a task is
        self.item_numbers: list[int] | None = None  # the numbers of the items that a task asks; None: all
        self._requested = self._answered = 0  # requests
        with undisturbed():  # it warns of every model in memory
            super().__init__(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),  # lm-eval may set its pad token
                backend="causal",
                batch_size=batch_size,
                mixed_precision_dtype=None if dtype == "float32" else dtype,
                **{"softmax_dtype": "float32"} | options,
            )

    def _model_call(
        self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits ``[batch, length, vocabulary]`` of token ids ``[batch, length]``."""
        # lm-eval pads on the right with id 0 and passes no mask: find the padding again
        mask = torch.ones(inps.shape, dtype=torch.long)
        for row, tokens in zip(mask, inps.tolist(), strict=True):
            bare = _without_zeros(tokens)
            row[self._ending_in_zero.get(bare, max(1, len(bare))) :] = 0
        mask = mask.to(inps.device)
        kind, precision = self.device.type, self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(kind, dtype=precision, enabled=precision is not None):
            logits = self.model(input_ids=inps, attention_mask=mask, use_cache=False).logits
        self._answered += len(inps)
        if self.share is not None and self._requested:
            self.share(self._answered / self._requested)
        return logits

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **options: Any) -> list[Any]:
        self._ending_in_zero, self._requested, self._answered = {}, len(requests), 0
        for _, context, continuation in requests:
            tokens = [*context, *continuation][-self.max_length - 1 : -1]  # as lm-eval cuts them
            if tokens and tokens[-1] == 0:
                bare = _without_zeros(tokens)
                self._ending_in_zero[bare] = max(len(tokens), self._ending_in_zero.get(bare, 0))
        return super()._loglikelihood_tokens(requests, *args, **options)

    def loglikelihood(
        self, requests: "list[Instance]", disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of each request the log-likelihood in nats, and whether greedy decoding gives it.

        Raises:
            FloatingPointError: the first request whose logits are NaN, by task and item.
        """
        hidden = disable_tqdm or self.share is not None
        answers = super().loglikelihood(requests, disable_tqdm=hidden)
        for request, (score, _) in zip(requests, answers, strict=True):
            if math.isnan(score):
                item = self.item_numbers[request.doc_id] if self.item_numbers else request.doc_id
                raise FloatingPointError(f"The model's logits are NaN in {request.task_name}, item {item}.")
        return answers
