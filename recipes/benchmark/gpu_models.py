"""What gpu_decoding.py decodes: a size's random weights at given shares, or a student as it was trained."""

import argparse
import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
from gpu_tables import BF16, INT8, TRAINED
from shares import NEURON, set_shares, shares_for

from spiking_mamba import (
    EventDrivenMambaForCausalLM,
    SpikingMambaConfig,
    SpikingMambaForCausalLM,
    event_driven,
)
from spiking_mamba.model.checkpoint import load_dense, load_model
from spiking_mamba.model.state_spaces import published_config
from spiking_mamba.model.tokenizer import load_tokenizer

__all__ = ["Models", "RandomModels", "StudentModels", "models_of", "way_name"]

PROMPT = 64  # tokens
# Of a student, whose spikes depend on what it reads.
TEXT = (
    "The river rises in the hills above the old town and turns south past three mills, of which one still "
    "grinds. In spring, when the snow melts, it floods the lower meadows, and the farmers who live there "
    "move their animals to the barns on the ridge. A stone bridge, built after the great fire, carries the "
    "only road to the market, and children fish from it in summer."
)
TINY = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 32}


class Models(ABC):
    """Models of one configuration, made where they are needed first."""

    shares: tuple[float | str, ...]  # that the event-driven ones are made for
    watched = 1  # tokens, of which bytes and shares are the mean

    def __init__(self, config: SpikingMambaConfig, args: argparse.Namespace) -> None:
        self.config, self.args = config, args
        self._made: dict[Any, Any] = {}

    def prompt(self, batch: int) -> torch.Tensor:
        """Tokens ``[batch, PROMPT]``."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.config.vocab_size, (batch, PROMPT), generator=generator)
        return ids.to(self.args.device)

    @abstractmethod
    def dense(self) -> SpikingMambaForCausalLM:
        """In float32."""

    @abstractmethod
    def spiking(self, share: float | str) -> SpikingMambaForCausalLM:
        """In float32."""

    def bf16(self) -> SpikingMambaForCausalLM:
        if BF16 not in self._made:
            model = copy.deepcopy(self.dense())
            if self.args.device == "cuda":
                model.to(torch.bfloat16).capture_decoding()
            self._made[BF16] = model
        return self._made[BF16]

    def integers(self, share: float | str | None, weights: str) -> EventDrivenMambaForCausalLM:
        """Dense without a share."""
        if (share, weights) not in self._made:
            with torch.device(self.args.device):
                source = self.dense() if share is None else self.spiking(share)
                made = event_driven(source, weights, self.args.states)
            made.set_decoding("compiled" if self.args.device == "cuda" else "torch")
            self._made[share, weights] = made
        return self._made[share, weights]


class RandomModels(Models):
    """Of a size, all of the same random weights."""

    def __init__(self, config: SpikingMambaConfig, args: argparse.Namespace) -> None:
        super().__init__(config, args)
        torch.manual_seed(0)
        self.shares = tuple(args.shares)
        fields = {k: v for k, v in config.to_dict().items() if k != "model_type"}
        with torch.device(args.device):
            self._dense = SpikingMambaForCausalLM(SpikingMambaConfig(**fields | {"neuron": None})).eval()
        self.config = self._dense.config

    def dense(self) -> SpikingMambaForCausalLM:
        return self._dense

    def spiking(self, share: float | str) -> SpikingMambaForCausalLM:
        assert isinstance(share, float)
        source = SpikingMambaForCausalLM.from_dense(self._dense, neuron=NEURON).eval()
        set_shares(source, shares_for(self.config, share))
        return source


class StudentModels(Models):
    """A student as it was trained, and its teacher."""

    shares = (TRAINED,)
    watched = 32

    def __init__(self, args: argparse.Namespace) -> None:
        self._student = load_model(args.student).to(args.device).eval()
        self._dense = load_dense(args.teacher).to(args.device).eval()
        super().__init__(self._dense.config, args)

    def prompt(self, batch: int) -> torch.Tensor:
        found = load_tokenizer(self.args.student)(TEXT, return_tensors="pt")["input_ids"][:, :PROMPT]
        return found.expand(batch, -1).contiguous().to(self.args.device)

    def dense(self) -> SpikingMambaForCausalLM:
        return self._dense

    def spiking(self, share: float | str) -> SpikingMambaForCausalLM:
        return self._student


def models_of(args: argparse.Namespace) -> Models:
    """What the command asks for."""
    if args.student is not None:
        return StudentModels(args)
    config = SpikingMambaConfig(**TINY, n_groups=1, state_size=16) if args.smoke else None
    config = config or published_config(f"state-spaces/mamba2-{args.size}")
    config.num_hidden_layers = args.layers or config.num_hidden_layers
    return RandomModels(config, args)


def way_name(share: float | str | None, weights: str) -> str:
    """What the tables call a way: int8 is said of the dense one only."""
    if share is None:
        return INT8.replace("int8", weights)
    told = share if isinstance(share, str) else f"{share:.0%}"
    return f"event-driven{'' if weights == 'int8' else ' ' + weights}, {told}"
