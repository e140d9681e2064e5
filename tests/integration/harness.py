"""A deployment for a test: its own folder and ports, bounded commands, and proof of a clean end.

Everything lives under one short folder in /tmp (a unix socket's path must be short), and every
process that a deployment starts names that folder in its command line: so what is left behind can
be seen, and nothing else is ever touched.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import http.client as http_client
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import urllib.error
import urllib.request
import xmlrpc.client
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
from supervisor.xmlrpc import SupervisorTransport

from supervisor_synapse.adapters import snapshots
from tests.gguf_factory import HubCache, Value, hub_cache, write_gguf, write_model
from tests.ports import free_ports

BIN = Path(sys.executable).parent
T = TypeVar("T")

_POLL_SECONDS = 0.05
_PATIENCE = float(os.environ.get("SYNAPSE_PATIENCE", "2"))
_COMMAND_SECONDS = 60.0
_READY_SECONDS = 60.0
_FOREIGN = ("SYNAPSE_", "HF_", "HUGGINGFACE_", "LLAMA_", "XDG_", "COLUMNS", "LINES")
# Loopback only, whatever the environment says of proxies.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


# --- waiting -------------------------------------------------------------------------------------


def wait_until(predicate: Callable[[], T], seconds: float, what: str = "") -> T:
    """The first truthy value of `predicate`; the test fails where none comes in time."""
    deadline = time.monotonic() + seconds
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what or predicate}; last: {value!r}")
        time.sleep(_POLL_SECONDS)


def promised(seconds: float) -> float:
    """What a model's user is promised, made wider for a busy machine; SYNAPSE_PATIENCE=1: exact."""
    return seconds * _PATIENCE


def holds_for(predicate: Callable[[], object], seconds: float) -> bool:
    """Whether `predicate` stays true for so long; looked at without pause, at least twice."""
    deadline = time.monotonic() + seconds
    held = bool(predicate())
    while held and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        held = bool(predicate())
    return held


# --- HTTP on loopback ----------------------------------------------------------------------------


def http(
    url: str, body: object | None = None, *, login: tuple[str, str] | None = None
) -> tuple[int, bytes]:
    """Status and body of an answer, also of an error; `body` is sent as JSON."""
    request = urllib.request.Request(url)
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    if login is not None:
        token = base64.b64encode(":".join(login).encode()).decode()
        request.add_header("Authorization", f"Basic {token}")
    try:
        with _OPENER.open(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def ask(url: str, body: object) -> Any:
    """The JSON answer; anything but status 200 and strict UTF-8 fails the test."""
    status, answer = http(url, body)
    assert status == 200, answer
    return json.loads(answer.decode("utf-8", "strict"))


def chat(model: Mapping[str, Any], content: object = "Hello") -> str:
    """What a model says; the test fails where it says nothing."""
    question = {
        "model": model["alias"],
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 8,
    }
    answer = ask(f"{model['url']}/v1/chat/completions", question)
    said: str = answer["choices"][0]["message"]["content"]
    assert said.strip(), answer
    return said


@contextlib.contextmanager
def stranger_on(port: int) -> Iterator[None]:
    """Somebody else listens on `port`."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
        yield


class TokenStream:
    """A completion that streams, read in a thread of its own; made once its first token came.

    The same prompt gives the same tokens each time, since the likeliest is always taken.
    """

    def __init__(self, url: str, tokens: int) -> None:
        self.tokens: list[int] = []
        self.complete = False  # ended as a stream should
        self._response = self._ask(url, tokens)
        self._take(self._response.readline())
        assert self.tokens, "no first token"
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _ask(self, url: str, tokens: int) -> Any:
        body = {
            "prompt": "the road", "n_predict": tokens, "stream": True, "temperature": 0,
            "return_tokens": True, "cache_prompt": False,
        }  # fmt: skip
        request = urllib.request.Request(f"{url}/completion", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        return _OPENER.open(request, timeout=30)

    def _take(self, line: bytes) -> None:
        if line.startswith(b"data: "):
            event = json.loads(line[6:])
            self.tokens += event["tokens"]
            self.complete = self.complete or event["stop"]

    def _read(self) -> None:
        with self._response, contextlib.suppress(OSError, http_client.HTTPException, ValueError):
            for line in self._response:
                self._take(line)

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return not self._thread.is_alive()

    def end(self, seconds: float = 30) -> list[int]:
        """All tokens, once the stream is over."""
        self._thread.join(seconds)
        assert self.is_over, f"still streaming after {len(self.tokens)} tokens"
        return self.tokens


# --- a deployment --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended."""

    status: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """All that it said."""
        return self.out + self.err

    def json(self) -> Any:
        """Its stdout, which must be one JSON document and nothing else."""
        return json.loads(self.out)


class Deployment:
    """One prefix, one hub cache, and a range of ports; `close` ends it and proves that it ended."""

    def __init__(self, settings: str = "", *, ports: int = 40) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="syn", dir="/tmp"))
        self.prefix = self.root / "p"
        self.etc = self.prefix / "etc"
        self.conf_d = self.etc / "conf.d"
        self.log = self.prefix / "var" / "log"
        self.lib = self.prefix / "var" / "lib"
        self.sources = self.root / "src"
        self.hub: HubCache = hub_cache(self.root / "hf" / "hub")
        self.first_port = free_ports(ports)
        self.ports = range(self.first_port, self.first_port + ports)
        self.extra_environment: dict[str, str] = {}
        self.prefix.mkdir(mode=0o700)
        self.etc.mkdir(mode=0o700)
        self.configure(settings)

    # settings

    def configure(self, settings: str = "") -> None:
        """Write etc/synapse.conf: our port range, then `settings` (which begins in [synapse])."""
        ports = f"port_range = {self.ports[0]}-{self.ports[-1]}"
        path = self.etc / "synapse.conf"
        # Deployments of tests would all listen on the same port.
        gateway = "" if "[gateway]" in settings else "[gateway]\nenabled = false\n"
        text = f"[synapse]\n{ports}\n{settings}\n{gateway}"
        path.write_text(text, "utf-8", "surrogateescape")
        path.chmod(0o600)

    def environment(self) -> dict[str, str]:
        """Ours, without what would lead out of this deployment."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
        own = {"HOME": str(self.root), "HF_HOME": str(self.root / "hf")}
        return kept | own | self.extra_environment

    def add(self, *names: str, **options: Any) -> None:
        """A small model of each name, each in a repo of its own; `options` of `write_model`."""
        for name in names:
            seed = zlib.crc32(name.encode())
            file = write_model(self.sources / f"{name}.gguf", seed=seed, **options)
            self.hub.add(f"acme/{name}", {f"{name}.gguf": file})

    def open_web_server(self) -> str:
        """supervisord's own web server, from its next start on; where it answers."""
        port = free_ports(1)
        with (self.etc / "supervisord.conf").open("a") as main_file:
            main_file.write(f"\n[inet_http_server]\nport=127.0.0.1:{port}\n")
        return f"http://127.0.0.1:{port}"

    # commands

    def run(self, *command: str, seconds: float = _COMMAND_SECONDS, expect: int | None = 0) -> Done:
        """Run a command to its end. `expect`: its exit status (None: any)."""
        ended = subprocess.run(
            command, env=self.environment(), cwd=self.root, stdin=subprocess.DEVNULL,
            capture_output=True, timeout=seconds, check=False,
        )  # fmt: skip
        done = Done(ended.returncode, ended.stdout.decode("utf-8", "strict"), ended.stderr.decode())
        if expect is not None:
            assert done.status == expect, f"{command} ended with {done}"
        return done

    def synapse(self, *arguments: str, expect: int | None = 0) -> Done:
        """Run our command line on this prefix."""
        return self.run(*self.command(*arguments), expect=expect)

    def command(self, *arguments: str) -> list[str]:
        """The words of our command line on this prefix."""
        return [str(BIN / "synapse"), "--prefix", str(self.prefix), *arguments]

    def ctl(self, *arguments: str, expect: int | None = 0) -> Done:
        """Run supervisorctl on this deployment."""
        main_file = str(self.etc / "supervisord.conf")
        return self.run(str(BIN / "supervisorctl"), "-c", main_file, *arguments, expect=expect)

    def shell(self, line: str) -> Done:
        """Run a line as a user would who copied it from the screen."""
        return self.run("/bin/sh", "-c", line)

    def discover(self, *arguments: str, expect: int | None = 0) -> Any:
        """What `discover --json` says."""
        return self.synapse("discover", "--json", *arguments, expect=expect).json()

    def discover_first(self) -> Any:
        """Lay the deployment down and discover, with supervisord not running yet."""
        self.synapse("init")
        return self.discover()

    def plan(self) -> Any:
        """What `plan --json` says."""
        return self.synapse("plan", "--json").json()

    # what is there

    def models(self) -> dict[str, Any]:
        """The listener's view of each model, by name."""
        return {model["name"]: model for model in self.ctl("models", "--json").json()}

    def rows(self) -> dict[str, Any]:
        """The same by XML-RPC, which takes a hundredth of the time; none while nobody answers."""
        with contextlib.suppress(OSError, http_client.HTTPException, xmlrpc.client.Error):
            with self.rpc() as server:
                text = str(server.synapse.models())
            found = snapshots.public(snapshots.load(text).models) if text else []
            return {str(row["name"]): row for row in found}
        return {}

    def wait_for_rows(
        self, phases: Mapping[str, str], seconds: float = _READY_SECONDS
    ) -> dict[str, Any]:
        """`wait_for` by XML-RPC."""

        def reached() -> dict[str, Any] | None:
            rows = self.rows()
            seen = {name: row["phase"] for name, row in rows.items()}
            return rows if phases.items() <= seen.items() else None

        found = wait_until(reached, seconds, f"{phases}")
        assert found is not None
        return found

    def model(self, name: str) -> Any:
        """The listener's view of one model."""
        return self.models()[name]

    def wait_for(
        self, phases: Mapping[str, str], seconds: float = _READY_SECONDS
    ) -> dict[str, Any]:
        """All models, once those named are in these phases."""

        def reached() -> dict[str, Any] | None:
            models = self.models()
            seen = {name: model["phase"] for name, model in models.items()}
            return models if phases.items() <= seen.items() else None

        found = wait_until(reached, seconds, f"{phases}")
        assert found is not None
        return found

    def wait_ready(self, seconds: float = _READY_SECONDS) -> dict[str, Any]:
        """All models, once every enabled one is ready."""

        def ready() -> dict[str, Any] | None:
            models = self.models()
            enabled = [model for model in models.values() if model["enabled"]]
            done = enabled and all(model["phase"] == "ready" for model in enabled)
            return models if done else None

        found = wait_until(ready, seconds, "every enabled model ready")
        assert found is not None
        return found

    def pids(self) -> dict[str, int]:
        """The process of each running model, by name."""
        return {name: model["pid"] for name, model in self.models().items() if model["pid"]}

    def blocks(self) -> dict[str, tuple[int, bytes]]:
        """Name, modification time and content of each file of etc/conf.d."""
        return {
            path.name: (path.stat().st_mtime_ns, path.read_bytes())
            for path in sorted(self.conf_d.iterdir())
        }

    def programs(self) -> dict[str, list[str]]:
        """What supervisord itself holds: the words of each program's command, by its name."""
        with self.rpc() as server:
            found: Any = server.supervisor.getAllConfigInfo()
        return {program["name"]: shlex.split(program["command"]) for program in found}

    def rpc(self) -> xmlrpc.client.ServerProxy:
        """XML-RPC to supervisord, for one thread; to be used in a `with`."""
        transport = SupervisorTransport(None, None, f"unix://{self.prefix}/var/run/supervisor.sock")
        return xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport)

    def log_of(self, name: str) -> str:
        """What a model's server and its launcher have printed; "" where nothing yet."""
        path = self.log / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def history(self) -> list[Any]:
        """Every transition so far, oldest first; a line that is just being written is not one."""
        whole, _, _ = (self.log / "history.jsonl").read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def steps(self, name: str, since: float = 0.0) -> list[Any]:
        """The transitions of one model since a wall-clock time, oldest first."""
        with contextlib.suppress(FileNotFoundError):
            return [
                step for step in self.history() if step["model"] == name and step["when"] >= since
            ]
        return []

    def stop_lines(self, name: str) -> list[dict[str, str]]:
        """What the launcher said of each stop of a model, oldest first: its fields."""
        mark = "synapse-run: stopped: "
        lines = (self.log / f"{name}.log").read_text("utf-8", "replace").splitlines()
        said = [line.removeprefix(mark) for line in lines if line.startswith(mark)]
        return [dict(re.findall(r"(\w+)=([^,]*)", line)) for line in said]

    def wait_for_step(
        self, name: str, since: float, seconds: float, *, to: str = "", out_of: str = ""
    ) -> Any:
        """The first transition of a model since then, to or out of a phase, within `seconds`."""

        def made() -> Any:
            for step in self.steps(name, since):
                if to in ("", step["to"]) and out_of in ("", step["from"]):
                    return step
            return None

        left = max(since + seconds - time.time(), 0)
        return wait_until(made, left, f"{name} {out_of} -> {to}; steps: {self.steps(name, since)}")

    def start_supervisord(self) -> None:
        """As a user starts it, without `synapse up`: nothing is discovered and nobody waits."""
        self.run(str(BIN / "supervisord"), "-c", str(self.etc / "supervisord.conf"))

    def listener(self) -> psutil.Process | None:
        """The event listener, where one runs."""
        for process in self.processes():
            words = _words(process)
            if words and words[-1] == "listen":
                return process
        return None

    def supervisord(self) -> psutil.Process:
        """The supervisord of this deployment."""
        pid = int((self.prefix / "var" / "run" / "supervisord.pid").read_text())
        return psutil.Process(pid)

    def processes(self) -> list[psutil.Process]:
        """Every process whose command line names this deployment, and that is not a zombie."""
        own = str(self.root)
        return [
            process
            for process in psutil.process_iter()
            if any(own in word for word in _words(process))
        ]

    def servers(self) -> dict[str, psutil.Process]:
        """The llama-server processes, by the alias that each was given."""
        return dict(self.all_servers())

    def all_servers(self) -> list[tuple[str, psutil.Process]]:
        """The same with duplicates, should there be any: alias and process of each."""
        found = []
        for process in self.processes():
            words = _words(process)
            if words and Path(words[0]).name == "llama-server" and "--alias" in words:
                found.append((words[words.index("--alias") + 1], process))
        return found

    # the end

    def down(self) -> Done:
        """Stop everything."""
        return self.synapse("down")

    def close(self) -> None:
        """Stop, and fail where a process of this deployment is left."""
        said: object = None
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            said = self.synapse("down", expect=None)
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not self.processes(), 5)
        left = [(process, _words(process)) for process in self.processes()]
        for process, _ in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(self.root, ignore_errors=True)
        assert not left, f"left behind after `synapse down` ({said}): {left}"


def is_gone(process: psutil.Process) -> bool:
    """Whether it has ended; a zombie has."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _words(process: psutil.Process) -> list[str]:
    try:
        words: list[str] = process.cmdline()
    except psutil.Error:
        return []
    return words


@contextlib.contextmanager
def deployed(settings: str = "", *, ports: int = 40) -> Iterator[Deployment]:
    """A deployment that is closed at the end, also of a test that failed."""
    deployment = Deployment(settings, ports=ports)
    try:
        yield deployment
    finally:
        deployment.close()


# --- a command in the foreground -----------------------------------------------------------------

# A session of its own with Ctrl-C in its usual meaning, also where the tests themselves run in
# the background; standard input becomes the controlling terminal where it is one.
_TRAMPOLINE = """
import fcntl, os, signal, sys, termios
os.setsid()
if os.isatty(0):
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Foreground:
    """A command of ours that runs until it is interrupted; what it says is read as it comes."""

    def __init__(self, deployment: Deployment, *arguments: str, terminal: bool) -> None:
        """In a terminal of 24 lines by 80 columns, or with its output in a pipe."""
        self._said = b""
        self._keys: int | None = None
        command = [sys.executable, "-c", _TRAMPOLINE, *deployment.command(*arguments)]
        environment = deployment.environment() | {"TERM": "xterm"}
        if terminal:
            self._output, inside = pty.openpty()
            fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
            self._keys, given = self._output, inside
        else:
            self._output, inside = os.pipe()
            given = subprocess.DEVNULL
        self.process = subprocess.Popen(
            command, env=environment, stdin=given, stdout=inside, stderr=inside
        )
        os.close(inside)

    @property
    def said(self) -> str:
        """All that has been read so far."""
        return self._said.decode("utf-8", "replace")

    def wait_for(self, text: str, seconds: float = _READY_SECONDS) -> str:
        """Read until `text` has been said; all that was said so far."""
        deadline = time.monotonic() + seconds
        while text not in self.said:
            assert time.monotonic() < deadline, f"{text!r} was not said: {self.said}"
            assert self._read() or text in self.said, f"ended without {text!r}: {self.said}"
        return self.said

    def press_ctrl_c(self) -> None:
        """The key itself in a terminal (every process of its foreground group gets the signal)."""
        if self._keys is None:
            self.process.send_signal(signal.SIGINT)
        else:
            os.write(self._keys, b"\x03")

    def end(self, seconds: float = 30) -> int:
        """Its exit status, once it has ended and all was read."""
        deadline = time.monotonic() + seconds
        while self._read():
            assert time.monotonic() < deadline, f"did not end: {self.said}"
        return self.process.wait(max(deadline - time.monotonic(), 1))

    def close(self) -> None:
        """End it where it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._output)

    def _read(self) -> bool:
        """Take what is there, for a moment; False at the end of the output."""
        if not select.select([self._output], [], [], 0.1)[0]:
            return True
        try:
            data = os.read(self._output, 65536)
        except OSError:  # a terminal whose last process has gone
            return False
        self._said += data
        return bool(data)


@contextlib.contextmanager
def foreground(deployment: Deployment, *arguments: str, terminal: bool) -> Iterator[Foreground]:
    """A command in the foreground that does not outlive the test."""
    command = Foreground(deployment, *arguments, terminal=terminal)
    try:
        yield command
    finally:
        command.close()


# --- a projector that works ----------------------------------------------------------------------


def write_working_projector(path: Path, *, seed: int = 0) -> Path:
    """A projector that the real server loads beside `write_model`'s default (64 wide).

    A SigLIP of one layer over 56 × 56 pixels: 16 patches, which gemma3's projector pools to one.
    """
    chance, width, inner = np.random.default_rng(seed), 32, 64

    def matrix(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return (chance.standard_normal(shape) * 0.05).astype(np.float32)

    def vector(size: int, value: float) -> np.ndarray[Any, np.dtype[np.float32]]:
        return np.full(size, value, dtype=np.float32)

    keys: dict[str, Value] = {
        "general.type": "mmproj", "general.file_type": 0,
        "clip.has_vision_encoder": True, "clip.has_audio_encoder": False,
        "clip.projector_type": "gemma3", "clip.use_gelu": True,
        "clip.vision.image_size": 56, "clip.vision.patch_size": 14,
        "clip.vision.embedding_length": width, "clip.vision.feed_forward_length": inner,
        "clip.vision.block_count": 1, "clip.vision.attention.head_count": 4,
        "clip.vision.attention.layer_norm_epsilon": 1e-6, "clip.vision.projection_dim": 64,
        "clip.vision.image_mean": [0.5, 0.5, 0.5], "clip.vision.image_std": [0.5, 0.5, 0.5],
    }  # fmt: skip
    tensors = {
        "v.patch_embd.weight": matrix(width, 3, 14, 14),
        "v.patch_embd.bias": vector(width, 0),
        "v.position_embd.weight": matrix(16, width),
        "v.post_ln.weight": vector(width, 1),
        "v.post_ln.bias": vector(width, 0),
        "mm.input_projection.weight": matrix(width, 64),
        "mm.soft_emb_norm.weight": vector(width, 1),
    }
    for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
        tensors |= {f"v.blk.0.{part}.weight": matrix(width, width)}
        tensors |= {f"v.blk.0.{part}.bias": vector(width, 0)}
    tensors |= {"v.blk.0.ffn_up.weight": matrix(inner, width)}
    tensors |= {"v.blk.0.ffn_up.bias": vector(inner, 0)}
    tensors |= {"v.blk.0.ffn_down.weight": matrix(width, inner)}
    tensors |= {"v.blk.0.ffn_down.bias": vector(width, 0)}
    for norm in ("ln1", "ln2"):
        tensors |= {f"v.blk.0.{norm}.weight": vector(width, 1)}
        tensors |= {f"v.blk.0.{norm}.bias": vector(width, 0)}
    return write_gguf(path, "clip", keys, tensors, tensor_type="F32")


def picture() -> dict[str, object]:
    """A plain PNG of 56 × 56 pixels, as a part of a chat message."""
    row = b"\0" + b"\x80\x40\x20" * 56
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (
            (b"IHDR", struct.pack(">IIBBBBB", 56, 56, 8, 2, 0, 0, 0)),
            (b"IDAT", zlib.compress(row * 56)),
            (b"IEND", b""),
        )
    )
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    return {"type": "image_url", "image_url": {"url": url}}


# --- faults --------------------------------------------------------------------------------------

_HERE = Path(__file__).parent
_PTRACE_SEIZE, _PTRACE_INTERRUPT = 0x4206, 0x4207

# Stops single threads of a process from outside. Ended threads must be waited for, or the process
# could never be reaped; what still stands when this program ends goes on.
_FREEZER = f"""
import ctypes, os, select, sys
libc = ctypes.CDLL(None, use_errno=True)
for thread in map(int, sys.argv[1:]):
    for request in ({_PTRACE_SEIZE}, {_PTRACE_INTERRUPT}):
        if libc.ptrace(ctypes.c_long(request), ctypes.c_long(thread), None, None):
            sys.exit(os.strerror(ctypes.get_errno()))
print("frozen", flush=True)
while not select.select([0], [], [], 0.02)[0]:
    try:
        os.waitpid(-1, os.WNOHANG | 0x40000000)  # __WALL
    except ChildProcessError:
        break
"""


@contextlib.contextmanager
def frozen_threads(threads: Iterable[int]) -> Iterator[None]:
    """Threads of another process stand still, while its other threads go on."""
    command = [sys.executable, "-c", _FREEZER, *map(str, threads)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as freezer:
        assert freezer.stdin is not None
        assert freezer.stdout is not None
        assert freezer.stdout.readline() == b"frozen\n"
        try:
            yield
        finally:
            freezer.stdin.close()
            freezer.wait(10)


def compute_threads(pid: int, compute: Callable[[], object]) -> list[int]:
    """The threads of a server that did the work while `compute` ran."""
    before = _thread_times(pid)
    compute()
    spent = {thread: took - before.get(thread, 0) for thread, took in _thread_times(pid).items()}
    most = max(spent.values())
    return [thread for thread, took in spent.items() if took > most / 4]


def _thread_times(pid: int) -> dict[int, float]:
    process = psutil.Process(pid)
    return {thread.id: thread.user_time + thread.system_time for thread in process.threads()}


class Script:
    """What each scripted server of a deployment does; see scripted_llama_server.py."""

    def __init__(self, deployment: Deployment) -> None:
        """Writes the program that `engine` in synapse.conf can name, as `self.engine`."""
        self._folder = deployment.root / "script"
        self._folder.mkdir(mode=0o700)
        self.engine = deployment.root / "llama-server"
        program = _HERE / "scripted_llama_server.py"
        words = f"'{sys.executable}' '{program}' --script '{self._folder}'"
        self.engine.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        self.engine.chmod(0o700)

    def set(self, alias: str, **behaviour: object) -> None:
        """From now on, in place of what it did."""
        path = self._folder / f"{alias}.json"
        new = path.with_suffix(".new")
        new.write_text(json.dumps(behaviour))
        new.replace(path)

    def starts(self, alias: str) -> list[tuple[float, int, int]]:
        """Wall-clock time, pid, and pid of the forked child (or 0), of each start."""
        lines = self._lines(alias, "starts")
        return [(float(when), int(pid), int(child)) for when, pid, child in map(str.split, lines)]

    def asked(self, alias: str) -> int:
        """How many tokens it was asked for."""
        return len(self._lines(alias, "asked"))

    def _lines(self, alias: str, kind: str) -> list[str]:
        path = self._folder / f"{alias}.{kind}"
        return path.read_text().splitlines() if path.exists() else []


@contextlib.contextmanager
def stranger_server(port: int, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server of somebody else that answers as a llama-server in good health would."""
    command = [sys.executable, str(_HERE / "scripted_llama_server.py"), "--script", str(folder)]
    command += ["--model", "stranger", "--alias", "stranger"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(command) as stranger:
        try:
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"), 10, "the stranger")
            yield stranger
        finally:
            stranger.kill()


def answers(url: str, seconds: float = 2.0) -> bool:
    """Whether a GET gets status 200 within so long."""
    try:
        with _OPENER.open(url, timeout=seconds) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


class Watch:
    """Looks again and again in a thread of its own, and keeps what it saw: (when, value)."""

    def __init__(self, look: Callable[[], object], period_seconds: float = 0.2) -> None:
        self.seen: list[tuple[float, object]] = []
        self._look, self._period_seconds = look, period_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(60)

    def _run(self) -> None:
        while not self._ended.is_set():
            began = time.time()
            self.seen.append((began, self._look()))
            self._ended.wait(self._period_seconds)


def lost_requests(model: Mapping[str, Any]) -> Watch:
    """A stream of requests to a model; what was lost stands in `seen` as text, else None."""

    def one() -> str | None:
        try:
            chat(model)
        except (OSError, http_client.HTTPException, AssertionError, ValueError) as error:
            return repr(error)
        return None

    return Watch(one, 0.05)
