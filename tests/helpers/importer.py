"""Import once what the recipes import, then fork a child for every command line: ``importer.py SOCKET``.

A message is a request, of JSON: ``arguments``, what stands behind ``python``, a script's path, ``-c`` or
``-m`` first; ``cwd``; ``late``, variables for the environment; with it come two files for what the child
prints. The answers are two messages, the child's process id and then its exit status (negative: the signal).
"""

import atexit
import gc
import importlib
import json
import math
import os
import pkgutil
import random
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler


def import_everything() -> None:
    """The packages here with all that they import, and what recipes import besides."""
    for package in ("neurons", "spiking_mamba"):
        found = importlib.import_module(package)
        for module in pkgutil.walk_packages(found.__path__, f"{package}."):
            if module.name.endswith("__main__"):  # which is to run
                continue
            try:
                importlib.import_module(module.name)
            except ImportError:  # of an extra that is not installed
                continue
    for name in ("trl", "matplotlib.pyplot"):
        try:
            importlib.import_module(name)
        except ImportError:
            continue


def serve(connection: socket.socket) -> list[str] | None:
    """Fork until the other side closes; returns the arguments in a child, None in this process."""
    while True:
        message, printing, _, _ = socket.recv_fds(connection, 2**20, 2)
        if not message:
            return None
        request = json.loads(message)
        if (pid := os.fork()) == 0:
            connection.close()
            become(request, *printing)
            return request["arguments"]
        for file in printing:
            os.close(file)
        connection.send(str(pid).encode())
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        connection.send(str(status).encode())


def become(request: dict[str, Any], out: int, err: int) -> None:
    """A child as if it had just been started."""
    os.environ.update(request["late"])
    for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), out, err)):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["cwd"])
    random.seed()
    np.random.seed()
    torch.seed()


def perform(arguments: list[str]) -> None:
    """What ``python ARGUMENTS`` does."""
    if arguments[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *arguments[2:]], ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(arguments[1], "<string>", "exec"), vars(main))
    elif arguments[0] == "-m":
        SubprocessHandler._popen = _forked
        sys.argv, sys.path[0] = arguments[1:], os.getcwd()
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.abspath(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")


class _Worker:
    """A child of torchrun, which takes it for a ``subprocess.Popen``."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = math.inf) -> int:
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return status


def _forked(handler: SubprocessHandler, command: Sequence[str], environment: Mapping[str, str]) -> _Worker:
    """What torchrun starts, ``python -u SCRIPT ARGUMENTS``, in a child of its own process."""
    if (pid := os.fork()) == 0:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        atexit._clear()
        os.environ.update(environment)
        sys.stdout.reconfigure(write_through=True)
        os._exit(status_of(list(command[2:])))
    return _Worker(pid)


def status_of(arguments: list[str]) -> int:
    """Run them, say what they raise, and do what is done at exit; the exit status."""
    status = 0
    try:
        perform(arguments)
    except SystemExit as end:
        if isinstance(end.code, int):
            status = end.code & 0xFF
        elif end.code is not None:
            print(end.code, file=sys.stderr)
            status = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return status


if __name__ == "__main__":
    import_everything()
    gc.freeze()
    given = serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0 if given is None else status_of(given))  # to free all that was imported would take seconds
