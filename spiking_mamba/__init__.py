"""SpikingMamba: a Mamba2 language model fed by signed spikes, its distillation and its energy."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration import SpikingMambaConfig
from .modeling import SpikingMambaForCausalLM, SpikingMambaModel, spike_driven
from .projection import SpikingProjection
from .versions import warn_if_untested

warn_if_untested()
AutoConfig.register(SpikingMambaConfig.model_type, SpikingMambaConfig)
AutoModel.register(SpikingMambaConfig, SpikingMambaModel)
AutoModelForCausalLM.register(SpikingMambaConfig, SpikingMambaForCausalLM)

__all__ = [
    "SpikingMambaConfig",
    "SpikingMambaForCausalLM",
    "SpikingMambaModel",
    "SpikingProjection",
    "spike_driven",
]
