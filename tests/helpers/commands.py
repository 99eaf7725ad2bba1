"""Real command lines, one process or two, each with one thread so that results repeat to the bit.

Importing torch and transformers takes most of a short command's time. So a command runs in a child of a
process that has imported them once, see :mod:`tests.helpers.importer`; in a new interpreter where it has
variables of its own, is to be ``fresh``, or the system does not fork well.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[2]
HELPERS = ROOT / "tests/helpers"
OWN = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
# variables of these names are read when they are wanted, others perhaps in an import
LATE = ("SPIKING_MAMBA_", "ACCELERATE_", "FSDP_", "PIP_")
# as this process found it: libraries set variables when they are imported
_ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(LATE)} | OWN

Wait = Callable[[float], int | None]  # at most so many seconds for the end: the exit status, None before it


def run(
    *command: object,
    cwd: Path = ROOT,
    timeout: float = 300,
    fresh: bool = False,
    kill_when: Callable[[], bool] = lambda: False,
    **environment: str,
) -> subprocess.CompletedProcess:
    """``python COMMAND``: a script and its arguments, ``-c`` and code, or ``-m`` and a module.

    Args:
        command: each part as its text.
        cwd: where it runs.
        timeout: in seconds.
        fresh: whether in a new interpreter anyway: where it matters what is imported and what is not.
        kill_when: asked again and again whether to kill it.
        environment: variables beside those that this process was started with.

    Raises:
        subprocess.TimeoutExpired: it took longer; it was killed.
    """
    request = {"arguments": list(map(str, command)), "cwd": str(cwd)}
    late = {name: value for name, value in (os.environ | environment).items() if name.startswith(LATE)}
    pipes = [os.pipe(), os.pipe()]  # files would be subject to a command's own limits of their size
    with ThreadPoolExecutor(2) as pool:
        printed = [pool.submit(_read, reading) for reading, _ in pipes]
        out, err = (writing for _, writing in pipes)
        if fresh or environment.keys() - late.keys() or sys.platform != "linux":
            process = _started(request, _ENVIRONMENT | late | environment, out, err)
            status = _ended(process.pid, partial(_wait, process), timeout, kill_when)
        else:
            with _importer() as importer:
                pid = importer.start(request | {"late": late}, out, err)
                status = _ended(pid, importer.wait, timeout, kill_when)
        return subprocess.CompletedProcess(request["arguments"], status, *(text.result() for text in printed))


def torchrun(*command: object, **environment: str) -> subprocess.CompletedProcess:
    return run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command, **environment)


def _ended(pid: int, wait: Wait, timeout: float, kill_when: Callable[[], bool]) -> int:
    deadline = time.monotonic() + timeout
    while (status := wait(0.005)) is None:
        late = time.monotonic() > deadline
        if late or kill_when():
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, signal.SIGKILL)
            while (status := wait(1)) is None:
                pass
            if late:
                raise subprocess.TimeoutExpired(str(pid), timeout)
            break
    return status


def _read(pipe: int) -> str:
    with open(pipe) as file:
        return file.read()


def _started(
    request: Mapping[str, Any], environment: Mapping[str, str], out: int, err: int
) -> subprocess.Popen:
    command = [sys.executable, *request["arguments"]]
    process = subprocess.Popen(command, cwd=request["cwd"], env=environment, stdout=out, stderr=err)
    os.close(out)
    os.close(err)
    return process


def _wait(process: subprocess.Popen, seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


class _Importer:
    """The process that has imported, and forks; it ends with this one, and has one user at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, HELPERS / "importer.py", str(other.fileno())]
        subprocess.Popen(command, env=_ENVIRONMENT, pass_fds=[other.fileno()], cwd=ROOT)
        other.close()

    def __enter__(self) -> Self:
        self._lock.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def start(self, request: Mapping[str, Any], out: int, err: int) -> int:
        socket.send_fds(self._socket, [json.dumps(request).encode()], [out, err])
        os.close(out)
        os.close(err)
        return self._reply()

    def wait(self, seconds: float) -> int | None:
        ready, _, _ = select.select([self._socket], [], [], seconds)
        return self._reply() if ready else None

    def _reply(self) -> int:
        reply = self._socket.recv(100)
        assert reply, "the process that imports for others has ended"
        return int(reply)


@cache
def _importer() -> _Importer:
    return _Importer()
