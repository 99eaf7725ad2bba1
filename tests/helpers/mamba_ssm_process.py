"""mamba-ssm's own reader and writer, in a process of its own: ``mamba_ssm_process.py JOBS.json WHEEL``.

Jobs are ``["write", config, folder]``: a model of that ``MambaConfig`` with random weights is saved by
mamba-ssm; and ``["read", folder, file]``: mamba-ssm loads a folder and its state dict goes to a file.
Its modules want Triton, einops and CUDA extensions for their kernels; nothing here runs a kernel, so
stand-ins serve.
"""

import json
import sys
from unittest.mock import MagicMock

import torch
from transformers.generation import GenerateDecoderOnlyOutput  # noqa: F401  (before Triton's stand-in)


class Config:
    def __init__(self, kwargs, num_warps=4, **_):
        self.kwargs, self.num_warps = kwargs, num_warps


class Kernel:
    def __init__(self, configs):
        self.configs = configs


def import_mamba_ssm():
    kernels = ("triton", "triton.language", "triton.language.extra", "triton.language.extra.libdevice")
    for name in (*kernels, "triton.testing", "einops", "causal_conv1d", "selective_scan_cuda"):
        sys.modules[name] = MagicMock(__version__="3.6.0")
    sys.modules["triton"].Config = Config
    sys.modules["triton"].autotune = lambda configs, **_: lambda function: Kernel(configs)
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    return MambaConfig, MambaLMHeadModel


def main() -> None:
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    sys.path.insert(0, sys.argv[2])  # a wheel is a zip file
    MambaConfig, MambaLMHeadModel = import_mamba_ssm()
    for kind, what, where in jobs:
        if kind == "write":
            torch.manual_seed(0)
            model = MambaLMHeadModel(MambaConfig(**what))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
            model.save_pretrained(where)
        else:
            torch.save(MambaLMHeadModel.from_pretrained(what).state_dict(), where)


if __name__ == "__main__":
    main()
