"""The engine's own word, without loading: against real loads, and what is done to an engine that
does not answer. Devices are ggml-rpc-server processes on loopback.
"""

from __future__ import annotations

import functools
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from supervisor_synapse.adapters import dry_run, engine, store
from supervisor_synapse.core.load_log import Loaded, parse_load
from supervisor_synapse.core.model import Engine
from tests.conftest import Engine as Binary
from tests.conftest import Serve
from tests.gguf_factory import write_embedding, write_model
from tests.ports import free_port
from tests.unit.builders import GIB, MIB

FLAGS = frozenset({"--fit", "--model"})
OVER = "common_fit_params: fitting params to free memory took 0.00 seconds"
_DEADLINE_SECONDS = 20.0

# What `ask` is for: this many bytes, on each device.
NEAR_BYTES = 3 * MIB


@pytest.fixture(scope="module")
def real_engine(llama_server: Binary) -> Engine:
    return engine.find(llama_server.path)


@pytest.fixture(scope="module")
def devices(llama_server: Binary) -> Iterator[str]:
    """`--rpc` for two devices, which end with the module's tests."""
    program = Path(llama_server.path).with_name("ggml-rpc-server")
    if not program.exists():
        pytest.skip("no ggml-rpc-server beside this llama-server")
    ports = [free_port(), free_port()]
    servers = [
        subprocess.Popen(
            [program, "-H", "127.0.0.1", "-p", str(port)], env=llama_server.environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for port in ports
    ]  # fmt: skip
    try:
        for port in ports:
            _until(functools.partial(_is_open, port))
        yield ",".join(f"127.0.0.1:{port}" for port in ports)
    finally:
        for server in servers:
            server.kill()
            server.wait()


@pytest.fixture
def ask(real_engine: Engine, tmp_path: Path) -> Callable[..., Loaded | None]:
    """`ask(model, *arguments)` with the real engine."""

    def asked(model: Path, *arguments: str) -> Loaded | None:
        return dry_run.ask(
            real_engine, str(model), arguments, free_bytes=GIB, lock=tmp_path / "lock"
        )

    return asked


def scripted(folder: Path, script: str) -> Engine:
    """An engine that runs `script`, and says in `folder`/pids who it is."""
    path = folder / "llama-server"
    path.write_text(f"#!/bin/sh\necho $$ >> {folder}/pids\n{script}\n")
    path.chmod(0o700)
    return Engine(str(path), "scripted", FLAGS)


def ask_scripted(folder: Path, script: str, seconds: float = 30.0) -> Loaded | None:
    return dry_run.ask(
        scripted(folder, script), "/m.gguf", (), free_bytes=GIB, lock=folder / "lock",
        seconds=seconds,
    )  # fmt: skip


def pids(folder: Path) -> list[int]:
    try:
        return [int(word) for word in (folder / "pids").read_text().split()]
    except FileNotFoundError:
        return []


def _until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# --- the real engine ------------------------------------------------------------------------------

ON_ONE = ("--device", "RPC0", "-ngl", "99")
ON_BOTH = ("--device", "RPC0,RPC1", "-ngl", "99")
DENSE: dict[str, Any] = {"layers": 8, "embedding": 256, "vocabulary": 8000, "context": 32768}
WINDOWED = DENSE | {"architecture": "gemma3", "sliding_window": 512}
EXPERTS = DENSE | {"architecture": "qwen3moe", "experts": 8, "layers": 4}

CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "on the host": (DENSE, ("-c", "4096", "--device", "none")),
    "on one device": (DENSE, (*ON_ONE, "-c", "4096")),
    "long context, four slots": (DENSE, (*ON_ONE, "-c", "32768", "-np", "4")),
    "slots of their own": (DENSE, (*ON_ONE, "-c", "8192", "-np", "4", "--no-kv-unified")),
    "quantized cache": (DENSE, (*ON_ONE, "-c", "8192", "-ctk", "q8_0", "-ctv", "q8_0")),
    "without flash attention": (DENSE, (*ON_ONE, "-c", "4096", "-fa", "off")),
    "some layers": (DENSE, ("--device", "RPC0", "-ngl", "3", "-c", "8192")),
    "no layers": (DENSE, ("--device", "RPC0", "-ngl", "0", "-c", "8192")),
    "on two devices": (DENSE, (*ON_BOTH, "-c", "8192")),
    "split unevenly": (DENSE, (*ON_BOTH, "-c", "8192", "-ts", "3,1")),
    "some layers on two devices": (DENSE, ("--device", "RPC0,RPC1", "-ngl", "5", "-c", "8192")),
    "sliding window": (WINDOWED, (*ON_ONE, "-c", "16384")),
    "sliding window on two devices": (WINDOWED, (*ON_BOTH, "-c", "16384", "-np", "2")),
    "experts": (EXPERTS, (*ON_ONE, "-c", "8192")),
    "experts on the host": (EXPERTS, (*ON_ONE, "-c", "8192", "-ncmoe", "2")),
    "large batches": (DENSE, (*ON_ONE, "-c", "8192", "-b", "2048", "-ub", "2048")),
}


@pytest.mark.parametrize("case", CASES)
def test_it_tells_what_a_real_load_takes_to_three_mebibytes_a_device(
    case: str, ask: Callable[..., Loaded | None], serve: Serve, devices: str, tmp_path: Path
) -> None:
    options, given = CASES[case]
    model = write_model(tmp_path / "model.gguf", **options)
    arguments = ("--rpc", devices, "--parallel", "1", *given)
    dry = ask(model, *arguments)
    real = _really(serve, model, arguments)
    assert dry is not None
    assert {part.device for part in dry.parts} == {part.device for part in real.parts}
    for part in real.parts:
        assert abs(dry.on(part.device) - part.total_bytes) <= NEAR_BYTES, (dry, real)
    assert dry.layers == real.layers


def test_a_draft_is_told_with_its_model(
    ask: Callable[..., Loaded | None], serve: Serve, devices: str, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model.gguf", **DENSE)
    draft = write_model(tmp_path / "draft.gguf", **(DENSE | {"layers": 1, "embedding": 128}))
    arguments = (
        "--rpc", devices, "--parallel", "1", *ON_ONE, "-c", "4096", "-md", str(draft),
        "--spec-type", "draft-simple", "-devd", "RPC1", "-ngld", "99",
    )  # fmt: skip
    dry, real = ask(model, *arguments), _really(serve, model, arguments)
    assert dry is not None
    assert {"RPC0", "RPC1", "CPU"} == {part.device for part in real.parts}
    for part in real.parts:
        assert abs(dry.on(part.device) - part.total_bytes) <= NEAR_BYTES, (dry, real)


def test_an_embedding_model_is_told(
    ask: Callable[..., Loaded | None], serve: Serve, devices: str, tmp_path: Path
) -> None:
    model = write_embedding(tmp_path / "model.gguf")
    arguments = ("--rpc", devices, *ON_ONE, "--parallel", "1", "--embeddings", "-c", "512")
    dry, real = ask(model, *arguments), _really(serve, model, arguments)
    assert dry is not None
    for part in real.parts:
        assert abs(dry.on(part.device) - part.total_bytes) <= NEAR_BYTES, (dry, real)


def _really(serve: Serve, model: Path, arguments: tuple[str, ...]) -> Loaded:
    """What a server told that loaded, and is ready."""
    serve(model, "--log-verbosity", "4", *arguments)
    log = model.parent / f"{model.name}.log"
    real = parse_load(log.read_text("utf-8", "replace"))
    assert real is not None
    return real


def test_no_weights_are_read(real_engine: Engine, tmp_path: Path) -> None:
    """What was mapped or read would be resident: in a process that has had no other child."""
    model = write_model(tmp_path / "m.gguf", layers=8, embedding=512, vocabulary=40_000)
    size_bytes = model.stat().st_size
    assert size_bytes > 80 * MIB
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from supervisor_synapse.adapters import dry_run\n"
        "from supervisor_synapse.core.model import Engine\n"
        "engine = Engine(sys.argv[1], 'real', frozenset({'--fit'}))\n"
        "arguments = ('-c', '4096', '--device', 'none')\n"
        "found = dry_run.ask(engine, sys.argv[2], arguments, free_bytes=2**40,\n"
        "                    lock=Path(sys.argv[3]))\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(found.on('CPU'), used.ru_maxrss, used.ru_inblock)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, real_engine.path, model, tmp_path / "lock"],
        stdin=subprocess.DEVNULL, capture_output=True, check=True, text=True, timeout=60,
    )  # fmt: skip
    told_bytes, resident, blocks = map(int, done.stdout.split())
    unit = 1 if sys.platform == "darwin" else 1024
    assert told_bytes > size_bytes
    assert resident * unit < size_bytes / 2
    assert blocks * 512 < size_bytes / 2


def test_a_port_that_is_taken_and_a_log_file_of_the_real_server_are_left_alone(
    ask: Callable[..., Loaded | None], tmp_path: Path
) -> None:
    """The real server runs on that port, and writes that file, while the question is asked."""
    model = write_model(tmp_path / "model.gguf")
    log = tmp_path / "server.log"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        found = ask(model, "-c", "512", "--port", port, "--log-file", str(log), "--log-disable")
    assert found is not None
    assert not log.exists()


@pytest.mark.parametrize("arguments", [("--no-such-flag",), ("--device", "NONE9"), ("-c", "x")])
def test_arguments_that_the_engine_refuses_tell_nothing(
    ask: Callable[..., Loaded | None], tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    assert ask(write_model(tmp_path / "model.gguf"), *arguments) is None


def test_a_split_that_cannot_be_fitted_tells_nothing(
    ask: Callable[..., Loaded | None], devices: str, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model.gguf", **DENSE)
    assert ask(model, "--rpc", devices, *ON_BOTH, "--split-mode", "tensor") is None


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\3\0\0\0" + b"\xff" * 4000])
def test_a_file_that_is_no_model_tells_nothing(
    ask: Callable[..., Loaded | None], tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "broken.gguf").write_bytes(content)
    assert ask(tmp_path / "broken.gguf") is None
    assert ask(tmp_path / "missing.gguf") is None


@pytest.mark.real
def test_the_real_model_is_told_in_seconds(
    ask: Callable[..., Loaded | None], real_model: Path
) -> None:
    """Seven tenths of one where the machine has nothing else to do: a vocabulary of 262,144."""
    began = time.monotonic()
    found = ask(real_model, "-c", "32768", "--parallel", "4", "--device", "none")
    assert time.monotonic() - began < 10
    assert found is not None
    assert found.on("CPU") == pytest.approx(425.8 * MIB, abs=NEAR_BYTES)


# --- when it is not asked -------------------------------------------------------------------------


@pytest.mark.parametrize("free_bytes", [0, 599 * MIB])
def test_where_memory_is_tight_nothing_is_started(tmp_path: Path, free_bytes: int) -> None:
    server = scripted(tmp_path, f"echo '{OVER}'")
    assert dry_run.ask(server, "/m", (), free_bytes=free_bytes, lock=tmp_path / "lock") is None
    assert pids(tmp_path) == []


def test_an_engine_that_cannot_fit_is_not_asked(tmp_path: Path) -> None:
    server = scripted(tmp_path, f"echo '{OVER}'")
    old = Engine(server.path, "old", frozenset({"--model"}))
    assert dry_run.ask(old, "/m", (), free_bytes=GIB, lock=tmp_path / "lock") is None
    assert pids(tmp_path) == []


def test_an_engine_that_is_gone_tells_nothing(tmp_path: Path) -> None:
    gone = Engine(str(tmp_path / "gone"), "gone", FLAGS)
    assert dry_run.ask(gone, "/m", (), free_bytes=GIB, lock=tmp_path / "lock") is None


def test_without_a_place_for_the_lock_nothing_is_started(tmp_path: Path) -> None:
    server = scripted(tmp_path, "exec sleep 60")
    lock = tmp_path / "gone" / "lock"
    assert dry_run.ask(server, "/m", (), free_bytes=GIB, lock=lock) is None
    assert pids(tmp_path) == []


def test_who_waits_too_long_for_others_does_not_ask(tmp_path: Path) -> None:
    with store.exclusive(tmp_path / "lock"):
        assert ask_scripted(tmp_path, "exec sleep 60", seconds=0.1) is None
    assert pids(tmp_path) == []


# --- an engine that does not answer, or too much --------------------------------------------------

ENDLESS = {
    "says nothing": "exec sleep 60",
    "ignores all signals": "trap '' TERM INT HUP PIPE; sleep 60 & wait",
    "leaves children": f"sleep 60 & echo $! >> {{folder}}/pids; sleep 60 & echo $! >> "
                       f"{{folder}}/pids; echo '{OVER}'; wait",
    "ends but leaves a child": "sleep 60 & echo $! >> {folder}/pids",
    "says half a line": "printf 'common_fit_params: fitting params to free'; exec sleep 60",
    "stops itself": "kill -STOP $$",
}  # fmt: skip
TOO_MUCH = {
    "lines without end": "exec yes 'load_tensors: CUDA0 model buffer size = 1.00 MiB'",
    "a line without end": "exec tr '\\0' a < /dev/zero",
    "empty lines without end": "exec tr '\\0' '\\n' < /dev/zero",
    "bytes that are no text": "exec cat /dev/urandom",
}


@pytest.mark.parametrize("how", ENDLESS)
def test_an_engine_that_does_not_answer_is_killed_in_time(tmp_path: Path, how: str) -> None:
    """With all that it started, as far as that stayed in its group."""
    began = time.monotonic()
    script = ENDLESS[how].replace("{folder}", str(tmp_path))
    assert ask_scripted(tmp_path, script, seconds=0.5) is None
    assert time.monotonic() - began < 10
    assert pids(tmp_path)
    _until(lambda: all(map(_is_gone, pids(tmp_path))))


@pytest.mark.parametrize("how", TOO_MUCH)
def test_an_engine_that_prints_without_end_is_not_read_without_end(
    tmp_path: Path, how: str
) -> None:
    began = time.monotonic()
    assert ask_scripted(tmp_path, TOO_MUCH[how], seconds=60) is None
    assert time.monotonic() - began < 30
    _until(lambda: all(map(_is_gone, pids(tmp_path))))


def test_it_has_no_input_and_a_group_of_its_own(tmp_path: Path) -> None:
    """A signal to our group, as from a terminal, does not reach it; reading gives end of file."""
    script = f"cat; ps -o pgid= -p $$ >> {tmp_path}/group; echo '{OVER}'; exec sleep 60"
    assert ask_scripted(tmp_path, script) is None
    assert int((tmp_path / "group").read_text()) == pids(tmp_path)[0] != os.getpgrp()


@pytest.mark.skipif(sys.platform != "linux", reason="only there a process's files are listed")
def test_it_does_not_hold_the_lock(tmp_path: Path) -> None:
    """A child of it that got away would hold it for as long as it lives."""
    ask_scripted(tmp_path, f"ls -l /proc/$$/fd > {tmp_path}/open; echo '{OVER}'; exec sleep 60")
    opened = (tmp_path / "open").read_text()
    assert "pipe:" in opened
    assert str(tmp_path / "lock") not in opened


@pytest.mark.skipif(sys.platform != "linux", reason="no other kernel can do that")
def test_when_we_die_it_dies(tmp_path: Path) -> None:
    """Killed without a chance to clean up."""
    server = scripted(tmp_path, "exec sleep 60")
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from supervisor_synapse.adapters import dry_run\n"
        "from supervisor_synapse.core.model import Engine\n"
        "engine = Engine(sys.argv[1], '', frozenset({'--fit'}))\n"
        "dry_run.ask(engine, '/m', (), free_bytes=2**40, lock=Path(sys.argv[2]))\n"
    )
    asking = subprocess.Popen(
        [sys.executable, "-c", script, server.path, tmp_path / "lock"], stdin=subprocess.DEVNULL
    )
    try:
        _until(lambda: pids(tmp_path))
        assert not _is_gone(pids(tmp_path)[0])
    finally:
        asking.send_signal(signal.SIGKILL)
        asking.wait()
    _until(lambda: _is_gone(pids(tmp_path)[0]))


def test_one_is_asked_at_a_time(tmp_path: Path) -> None:
    """By threads here, which stand for processes too: a lock is of the file that was opened."""
    script = (
        f"mkdir {tmp_path}/busy || touch {tmp_path}/overlap; sleep 0.1; rmdir {tmp_path}/busy; "
        f"echo '{OVER}'; exec sleep 60"
    )
    server, lock = scripted(tmp_path, script), tmp_path / "lock"
    ask = functools.partial(dry_run.ask, server, "/m", (), free_bytes=GIB, lock=lock)
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(pids(tmp_path)) == 4
    assert not (tmp_path / "overlap").exists()


def test_after_many_questions_nothing_is_left_open(tmp_path: Path) -> None:
    ask_scripted(tmp_path, f"echo '{OVER}'; exec sleep 60")
    before = psutil.Process().num_fds()
    for _ in range(20):
        ask_scripted(tmp_path, f"echo '{OVER}'; exec sleep 60")
    assert psutil.Process().num_fds() == before
    assert all(map(_is_gone, pids(tmp_path)))
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # they were waited for


# --- the command line -----------------------------------------------------------------------------

OURS = ["--fit", "on", "--log-verbosity", "5", "--host", "127.0.0.1", "--port", "0"]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ((), []),
        (("-c", "4096", "-ngl", "99"), ["-c", "4096", "-ngl", "99"]),
        (("--port", "8100", "--host", "0.0.0.0", "-c", "1"), ["-c", "1"]),  # noqa: S104
        (("--port=8100", "-c", "1"), ["-c", "1"]),
        (("--fit", "off", "-fit", "off", "-c", "1"), ["-c", "1"]),
        (("-lv", "1", "--verbosity", "2", "--log-verbosity", "3", "-v"), []),
        (("--log-file", "/var/log/x", "--log-colors", "on", "-c", "1"), ["-c", "1"]),
        (("--log-colors", "-c", "1"), ["-c", "1"]),
        (("--log-disable", "-c", "1", "--no-warmup"), ["-c", "1"]),
        (("--api-key", "secret", "--api-key-file", "/etc/keys", "-c", "1"), ["-c", "1"]),
        (("--model", "/other.gguf", "-c", "1"), ["-c", "1"]),
        (("--alias", "--port", "8100"), ["--alias"]),
        (("--mmproj", "/p.gguf", "--port"), ["--mmproj", "/p.gguf"]),
    ],
)
def test_the_real_arguments_are_kept_but_for_what_must_not_be_shared(
    given: tuple[str, ...], kept: list[str]
) -> None:
    words = dry_run.command(Engine("/e", "", FLAGS), "/m.gguf", given)
    assert words == ["/e", "--model", "/m.gguf", *kept, *OURS]


def test_nothing_is_downloaded() -> None:
    offline = Engine("/e", "", FLAGS | {"--offline"})
    assert dry_run.command(offline, "/m", ("-hf", "owner/repo"))[-1] == "--offline"


def test_what_the_environment_says_of_logs_and_keys_is_not_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LLAMA_ARG_LOG_FILE", "LLAMA_LOG_COLORS", "LLAMA_API_KEY", "LLAMA_ARG_RPC"):
        monkeypatch.setenv(name, "secret")
    ask_scripted(tmp_path, f"env > {tmp_path}/env; echo '{OVER}'; exec sleep 60")
    names = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert {name for name in names if name.startswith("LLAMA")} == {"LLAMA_ARG_RPC"}
