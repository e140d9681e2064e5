"""superlance's httpok beside our listener, on the same server and the same faults.

Both watch one scripted server: httpok by /health at supervisord's shortest tick (5 s), the program
itself with `autorestart=true`, as its users have it; ours with probes at 1 s and a stall time of
10 s. A fault is healed when another run of the server answers a completion; what is not healed
within 40 s counts as missed. Run: python -m tests.bench.bench_httpok (extra `bench`)
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.gguf_factory import write_model
from tests.integration.harness import BIN, Script, ask, deployed
from tests.ports import free_ports

_BOUND_SECONDS = 40.0
_SLOW_LOAD_SECONDS = 12.0
_ALIAS = "tiny"


@dataclass
class _Watched:
    """A scripted server that is looked after."""

    script: Script
    port: int


class _Home:
    """What `Script` needs of a deployment."""

    def __init__(self, root: Path) -> None:
        self.root = root


@contextlib.contextmanager
def _by_httpok() -> Iterator[_Watched]:
    with tempfile.TemporaryDirectory(prefix="syn") as folder:
        root = Path(folder)
        script = Script(_Home(root))  # type: ignore[arg-type]  # only its root is used
        port = free_ports(1)
        (root / "supervisord.conf").write_text(
            f"[supervisord]\nlogfile={root}/log\npidfile={root}/pid\nchildlogdir={root}\n"
            f"[unix_http_server]\nfile={root}/sock\n"
            "[rpcinterface:supervisor]\n"
            "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface\n"
            f"[program:{_ALIAS}]\ncommand={script.engine} --model x --alias {_ALIAS} "
            f"--host 127.0.0.1 --port {port} --metrics --slots\nautorestart=true\nstartsecs=1\n"
            f"[eventlistener:httpok]\ncommand={BIN}/httpok -p {_ALIAS} -t 2 "
            f"http://127.0.0.1:{port}/health\nevents=TICK_5\n"
        )
        command = [BIN / "supervisord", "--nodaemon", "--silent", "-c", root / "supervisord.conf"]
        with subprocess.Popen(command, cwd=root) as supervisord:
            try:
                yield _Watched(script, port)
            finally:
                family = psutil.Process(supervisord.pid).children(recursive=True)
                supervisord.kill()
                for process in family:
                    with contextlib.suppress(psutil.Error):
                        process.kill()


@contextlib.contextmanager
def _by_us() -> Iterator[_Watched]:
    with deployed() as deployment:
        script = Script(deployment)
        source = write_model(deployment.sources / f"{_ALIAS}.gguf")
        deployment.hub.add(f"bench/{_ALIAS}", {f"{_ALIAS}.gguf": source})
        deployment.configure(
            f"engine = {script.engine}\n[probe]\nperiod_seconds = 1\nstall_seconds = 10"
        )
        deployment.synapse("up", "--detach")
        yield _Watched(script, int(deployment.model(_ALIAS)["port"]))


def _answers(watched: _Watched) -> bool:
    with contextlib.suppress(OSError, AssertionError, ValueError):
        ask(f"http://127.0.0.1:{watched.port}/completion", {"prompt": "a", "n_predict": 1})
        return True
    return False


def _runs(watched: _Watched) -> list[int]:
    return [pid for _, pid, _ in watched.script.starts(_ALIAS)]


def _until(reached: Callable[[], bool]) -> float | None:
    """Seconds until it was so; None: not within the bound."""
    begun = time.monotonic()
    while time.monotonic() - begun < _BOUND_SECONDS:
        if reached():
            return time.monotonic() - begun
        time.sleep(0.05)
    return None


def _await_up(watched: _Watched) -> None:
    if _until(lambda: bool(_runs(watched)) and _answers(watched)) is None:
        raise RuntimeError("the server never answered")


def _healed(watched: _Watched, fault: Callable[[int], None]) -> float | None:
    """Seconds from the fault until another run answers."""
    _await_up(watched)
    before = _runs(watched)[-1]
    fault(before)
    anew = _until(lambda: _runs(watched)[-1] != before)
    watched.script.set(_ALIAS)
    answered = None if anew is None else _until(lambda: _answers(watched))
    with contextlib.suppress(OSError):
        os.kill(before, signal.SIGKILL)  # where nobody healed it
    return None if anew is None or answered is None else anew + answered


def _signal(number: int) -> Callable[[_Watched], float | None]:
    return lambda watched: _healed(watched, lambda pid: os.kill(pid, number))


def _frozen(watched: _Watched) -> float | None:
    """Nothing is computed, while every path answers 200."""
    return _healed(watched, lambda _: watched.script.set(_ALIAS, mode="frozen", busy=True))


def _slow_load(watched: _Watched) -> float | None:
    """A load that takes longer than any patience with 503; it needs one start, and no more."""
    _await_up(watched)
    watched.script.set(_ALIAS, load_seconds=_SLOW_LOAD_SECONDS, load_log="moves")
    before = len(_runs(watched))
    os.kill(_runs(watched)[-1], signal.SIGKILL)
    seconds = _until(lambda: len(_runs(watched)) > before and _answers(watched))
    watched.script.set(_ALIAS)
    return seconds


def _starts_of_a_crash_loop(watched: _Watched) -> float | None:
    """Starts within the bound of a server that ends 3 s after each."""
    _await_up(watched)
    before = len(_runs(watched))
    watched.script.set(_ALIAS, exit_after=3, exit_status=1)
    os.kill(_runs(watched)[-1], signal.SIGKILL)
    _until(lambda: False)
    watched.script.set(_ALIAS)
    return float(len(_runs(watched)) - before)


_FAULTS: tuple[tuple[str, str, Callable[[_Watched], float | None]], ...] = (
    ("killed (SIGKILL)", "s", _signal(signal.SIGKILL)),
    ("stopped (SIGSTOP)", "s", _signal(signal.SIGSTOP)),
    ("computes nothing, /health 200", "s", _frozen),
    (f"loads for {_SLOW_LOAD_SECONDS:.0f} s after a crash", "s", _slow_load),
    (f"starts in {_BOUND_SECONDS:.0f} s of a crash loop", "", _starts_of_a_crash_loop),
)


def _measure(watch: Callable[[], contextlib.AbstractContextManager[_Watched]]) -> list[str]:
    """Each fault in a deployment of its own: no backoff is left from the one before."""
    found = []
    for _, unit, fault in _FAULTS:
        with watch() as watched:
            value = fault(watched)
        if value is None:
            found.append("missed")
        else:
            found.append(f"{value:.1f} {unit}" if unit else f"{value:.0f}")
    return found


def main() -> int:
    ours, theirs = _measure(_by_us), _measure(_by_httpok)
    print(f"\n{'a server that ...':<34}{'ours':>10}{'httpok':>10}")
    for (what, _, _), us, them in zip(_FAULTS, ours, theirs, strict=True):
        print(f"{what:<34}{us:>10}{them:>10}")
    return int("missed" in ours)


if __name__ == "__main__":
    sys.exit(main())
