"""Run a distillation that dies by SIGKILL: ``killed.py MOMENT SCRIPT ARGUMENTS``."""

import os
import runpy
import signal
import sys

from transformers import Trainer


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def in_step(moment: str) -> None:
    train = Trainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 3:
            die()
        return train(self, *args, **kwargs)

    Trainer.training_step = training_step


def in_checkpoint(method: str) -> None:
    """Die in a method that writes a part of the second checkpoint."""
    write = getattr(Trainer, method)

    def die_in_the_second(self, *args, **kwargs):
        if self.state.global_step >= 4:
            die()
        return write(self, *args, **kwargs)

    setattr(Trainer, method, die_in_the_second)


if __name__ == "__main__":
    moment = sys.argv[1]
    (in_step if moment == "step" else in_checkpoint)(moment)
    sys.argv = sys.argv[2:]
    sys.path[0] = os.path.dirname(sys.argv[0])  # as Python does for a script
    runpy.run_path(sys.argv[0], run_name="__main__")
