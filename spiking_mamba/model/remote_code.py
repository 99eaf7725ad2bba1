"""The model as one file beside its weights, for programs that know transformers and spikingjelly alone.

``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` reads it.
"""

import ast
import json
from importlib.util import find_spec
from pathlib import Path

from spiking_mamba.common.flattening import Entity, flatten
from spiking_mamba.model.modeling import SpikingMambaForCausalLM

__all__ = ["FILE", "remote_code", "save_with_code"]

FILE = "modeling_spiking_mamba.py"
AUTO_MAP = {
    "AutoConfig": "SpikingMambaConfig",
    "AutoModel": "SpikingMambaModel",
    "AutoModelForCausalLM": "SpikingMambaForCausalLM",
    "AutoModelForSequenceClassification": "SpikingMambaForSequenceClassification",
}
_HOMES = {
    "SpikingMambaConfig": "configuration",
    "SpikingMambaModel": "backbone",
    "SpikingMambaForCausalLM": "modeling",
    "SpikingMambaForSequenceClassification": "classification",
}
# what a configuration may ask for by name
_NEURONS = ("SILIFNode", "TILIFNode", "SignedSpikeCount", "DeadZoneSpikeCount")
_SURROGATES = ("SignedSpikeCount", "DeadZoneSpikeCount")

_HEADER = '''"""A spiking Mamba2 in one file: needs torch, transformers and spikingjelly.

Made from the sources of the package spiking-mamba (Apache-2.0), which has the comments, and what is left out
here: CUDA kernels of the neurons, event-driven inference, students of dense models. Do not edit.
"""


class LeftOut:
    """A part of the package that is not here."""

    def __init__(self, name):
        self.name = name

    def __getattr__(self, attribute):
        raise RuntimeError(f"{self.name}.{attribute} needs the package spiking-mamba.")
'''
_NAMES = """
_OWN_NAMES = {own}


def {function}(module_name):
    own = _OWN_NAMES.get(module_name)
    return vars(importlib.import_module(module_name)) if own is None else own
"""


def remote_code() -> str:
    """The text of the file: the model's classes and what they need of this package."""
    packages = {}
    for name in ("neurons", "spiking_mamba"):
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        packages[name] = Path(spec.origin).parent
    roots = [(f"spiking_mamba.model.{home}", name) for name, home in _HOMES.items()]
    roots += [("neurons", name) for name in _NEURONS]
    text, named = flatten(packages, roots, ["neurons.cupy"], ["SpikingMambaForCausalLM.from_dense"])
    # operators of one name that two modules register would replace one another
    text = text.replace("'spiking_mamba::", "'spiking_mamba_remote::")
    own = {
        module: "{" + ", ".join(f"{name!r}: {name}" for name in names) + "}"
        for module, names in (("neurons", _NEURONS), ("neurons.surrogate", _SURROGATES))
    }
    shown = "{" + ", ".join(f"{module!r}: {names}" for module, names in own.items()) + "}"
    function = named[Entity("definition", "neurons.registry", "_names")]
    whole = f"{_HEADER}\n\n{text}\n{_NAMES.format(own=shown, function=function)}"
    ast.parse(whole)
    return whole


def save_with_code(model: SpikingMambaForCausalLM, folder: str | Path) -> None:
    """``save_pretrained``, with the model's code beside the weights and ``auto_map`` in ``config.json``."""
    folder = Path(folder)
    model.save_pretrained(folder)
    (folder / FILE).write_text(remote_code())
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {auto: f"{Path(FILE).stem}.{name}" for auto, name in AUTO_MAP.items()}
    path.write_text(json.dumps(config, indent=2) + "\n")
