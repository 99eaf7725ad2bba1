"""SpikingMamba: a Mamba2 language model fed by signed spikes, its distillation and its energy."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from spiking_mamba.common.versions import warn_if_untested
from spiking_mamba.model.backbone import SpikingMambaModel
from spiking_mamba.model.classification import SpikingMambaForSequenceClassification
from spiking_mamba.model.configuration import SpikingMambaConfig
from spiking_mamba.model.conversion import spike_driven
from spiking_mamba.model.event_driven import (
    EventDrivenMambaConfig,
    EventDrivenMambaForCausalLM,
    event_driven,
)
from spiking_mamba.model.modeling import SpikingMambaForCausalLM
from spiking_mamba.model.projection import SpikingProjection

warn_if_untested()
AutoConfig.register(SpikingMambaConfig.model_type, SpikingMambaConfig)
AutoModel.register(SpikingMambaConfig, SpikingMambaModel)
AutoModelForCausalLM.register(SpikingMambaConfig, SpikingMambaForCausalLM)
AutoModelForSequenceClassification.register(SpikingMambaConfig, SpikingMambaForSequenceClassification)
AutoConfig.register(EventDrivenMambaConfig.model_type, EventDrivenMambaConfig)
AutoModelForCausalLM.register(EventDrivenMambaConfig, EventDrivenMambaForCausalLM)

__all__ = [
    "EventDrivenMambaConfig",
    "EventDrivenMambaForCausalLM",
    "SpikingMambaConfig",
    "SpikingMambaForCausalLM",
    "SpikingMambaForSequenceClassification",
    "SpikingMambaModel",
    "SpikingProjection",
    "event_driven",
    "spike_driven",
]
