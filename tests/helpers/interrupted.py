"""Run a recipe that gets Ctrl-C: ``interrupted.py MOMENT SCRIPT ARGUMENTS``.

MOMENT is ``data``, while text is read; ``step-N``, in the training step after the Nth; ``evaluation``, when a
zero-shot task first asks the model.
"""

import os
import runpy
import signal
import sys

from transformers import Trainer

from spiking_mamba.evaluation import harness
from spiking_mamba.training import rows


def at(owner, name, due=lambda self: True):
    """Interrupt a call of this function."""
    call = getattr(owner, name)

    def interrupt(*args, **kwargs):
        if due(args[0]):
            os.kill(os.getpid(), signal.SIGINT)
        return call(*args, **kwargs)

    setattr(owner, name, interrupt)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell puts in the background ignores it
    moment, _, step = sys.argv[1].partition("-")
    if moment == "data":
        at(rows, "load_text")
    elif moment == "step":
        at(Trainer, "training_step", lambda trainer: trainer.state.global_step == int(step))
    else:
        at(harness.SpikingMambaLM, "_model_call")
    sys.argv = sys.argv[2:]
    sys.path[0] = os.path.dirname(sys.argv[0])  # as Python does for a script
    runpy.run_path(sys.argv[0], run_name="__main__")
