"""Hooks against real programs and servers: bounded in time, in what is read and in what is left."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from supervisor_synapse.adapters import hooks, webhooks
from supervisor_synapse.adapters.hooks import Outcome
from supervisor_synapse.errors import ConfigError

TEXT = '{"model": "tiny"}\n'
SOON_SECONDS = 20.0  # generous: this machine may be busy


def wait_until(holds: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + SOON_SECONDS
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


class Command:
    """A shell script in a folder of its own, and what is left of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "hook"

    def __call__(self, script: str, seconds: float = SOON_SECONDS, *words: str) -> Outcome:
        self.write(script)
        return hooks.run_command((str(self.path), *words), TEXT, seconds, self.folder)

    def write(self, script: str) -> None:
        self.path.write_text(f"#!/bin/sh\ncd {self.folder}\n{script}\n")
        self.path.chmod(0o700)

    def left(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    def process(self, name: str) -> psutil.Process:
        """By the number that the script wrote into a file."""
        wait_until(lambda: self.left(name).endswith("\n"), f"{name} was not written")
        return psutil.Process(int(self.left(name)))


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path)


def is_gone(pid: str) -> bool:
    try:
        return psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# --- a command -----------------------------------------------------------------------------------


def test_a_command_gets_the_object_on_its_stdin_and_its_words_as_they_are(command: Command) -> None:
    outcome = command('cat > got; printf "%s|" "$@" > words', SOON_SECONDS, "a b", "$(id)", "*")
    assert outcome == Outcome()
    assert command.left("got") == TEXT
    assert command.left("words") == "a b|$(id)|*|"


def test_no_secret_of_our_environment_reaches_it(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "SUPERVISOR_PASSWORD", "LLAMA_API_KEY", "X")
    for name in secrets:
        monkeypatch.setenv(name, "sesame")
    monkeypatch.setenv("LC_TIME", "C")
    assert command("env > got") == Outcome()
    assert "sesame" not in command.left("got")
    names = {line.partition("=")[0] for line in command.left("got").splitlines()}
    assert {"PATH", "LC_TIME", "SYNAPSE_PREFIX"} <= names
    assert f"SYNAPSE_PREFIX={command.folder}" in command.left("got")


def test_one_that_fails_tells_what_it_printed_last(command: Command) -> None:
    outcome = command("echo first; printf 'oh \\033[1mno\\n' >&2; exit 3")
    assert outcome.problem == "ended with status 3"
    assert outcome.output == "first oh [1mno"
    assert not outcome.may_pass


def test_one_that_prints_without_end_fills_nothing(command: Command) -> None:
    outcome = command("yes | head -c 30000000; exit 1")
    assert outcome.problem == "ended with status 1"
    assert 0 < len(outcome.output) <= 2048


def test_one_that_reads_nothing_is_none_the_worse(command: Command) -> None:
    """Also where there is more than a pipe holds."""
    command.write("exit 0")
    words = (str(command.path),)
    assert hooks.run_command(words, "x" * 10**6, SOON_SECONDS, command.folder) == Outcome()


def test_a_hanging_one_is_killed_with_its_child(command: Command) -> None:
    """Also one that ignores TERM, and holds its output open."""
    began = time.monotonic()
    outcome = command("trap '' TERM; sleep 600 & echo $! > child; echo $$ > own; wait", 1.0)
    assert outcome.problem == "had not ended after 1 s, and was killed"
    assert time.monotonic() - began < SOON_SECONDS
    for name in ("own", "child"):
        pid = command.left(name).strip()
        wait_until(lambda pid=pid: is_gone(pid), f"{name} was left behind")


def test_what_it_leaves_in_the_background_has_its_time_too(command: Command) -> None:
    assert command("(sleep 0.3; echo done > got) &") == Outcome()
    assert command.left("got") == "done\n"


def test_a_daemon_that_it_starts_is_not_waited_for_longer_than_that(command: Command) -> None:
    """One that leaves the process group is not ours to end; it holds the output open."""
    daemon = f"{sys.executable} -c 'import os, time; os.setsid(); time.sleep(600)' & echo $! > pid"
    began = time.monotonic()
    command(f"{daemon}\nsleep 1", SOON_SECONDS)
    assert time.monotonic() - began < SOON_SECONDS
    left = command.process("pid")
    left.kill()


def test_it_ends_when_who_asked_for_it_is_killed(command: Command) -> None:
    command.write("sleep 600 & echo $! > child; echo $$ > own; wait")
    program = (
        "import sys; from pathlib import Path; from supervisor_synapse.adapters import hooks;"
        f"hooks.run_command(({str(command.path)!r},), '', 600.0, Path({str(command.folder)!r}))"
    )
    with subprocess.Popen([sys.executable, "-c", program]) as asking:
        left = [command.process(name) for name in ("child", "own")]
        asking.kill()
    for process in left:
        wait_until(lambda one=process: is_gone(str(one.pid)), "left behind")


@pytest.mark.parametrize(
    ("mode", "mends"), [(0o770, "chmod go-w"), (0o702, "chmod go-w"), (0o600, "chmod u+x")]
)
def test_one_that_others_may_write_or_nobody_execute_is_not_run(
    command: Command, mode: int, mends: str
) -> None:
    command.write("echo ran > got")
    command.path.chmod(mode)
    outcome = hooks.run_command((str(command.path),), TEXT, SOON_SECONDS, command.folder)
    assert f"{mends} {command.path}" in outcome.problem
    assert command.left("got") == ""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_one_that_belongs_to_somebody_else_is_not_run(command: Command) -> None:
    command.write("echo ran > got")
    os.chown(command.path, 12345, -1)
    outcome = hooks.run_command((str(command.path),), TEXT, SOON_SECONDS, command.folder)
    assert "belongs to user 12345" in outcome.problem
    assert command.left("got") == ""


def test_one_in_a_folder_where_others_may_exchange_it_is_not_run(command: Command) -> None:
    """Also by way of a link."""
    command.write("echo ran > got")
    command.folder.chmod(0o777)
    link = command.folder.parent / f"{command.folder.name}-link"
    link.symlink_to(command.path)
    for path in (command.path, link):
        outcome = hooks.run_command((str(path),), TEXT, SOON_SECONDS, command.folder)
        assert f"chmod o-w {command.folder}" in outcome.problem
    assert command.left("got") == ""


@pytest.mark.parametrize(("name", "says"), [("nothing", "No such file"), (".", "is no program")])
def test_one_that_is_not_there_is_named(command: Command, name: str, says: str) -> None:
    path = f"{command.folder}/{name}"
    outcome = hooks.run_command((path,), TEXT, SOON_SECONDS, command.folder)
    assert path in outcome.problem
    assert says in outcome.problem


def test_one_without_an_interpreter_says_so(command: Command) -> None:
    command.path.write_text("#!/nowhere/sh\n")
    command.path.chmod(0o700)
    outcome = hooks.run_command((str(command.path),), TEXT, SOON_SECONDS, command.folder)
    assert outcome.problem == "ended with status 127"
    assert "cannot run" in outcome.output


# --- a webhook -----------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    """Notes what it gets, and answers as its server was told."""

    server: Server

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        body = self.rfile.read(length)
        self.server.got.append((self.path, dict(self.headers.items()), body))
        self.server.answer(self)

    def log_message(self, *_: Any) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, answer: Callable[[Handler], None], tls: Path | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.got: list[tuple[str, dict[str, str], bytes]] = []
        self.answer = answer
        scheme = "http"
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls)
            self.socket = context.wrap_socket(self.socket, server_side=True)
            scheme = "https"
        self.url = f"{scheme}://127.0.0.1:{self.server_port}/secret-path"

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is what is tested here."""


@contextlib.contextmanager
def serving(answer: Callable[[Handler], None], tls: Path | None = None) -> Iterator[Server]:
    with Server(answer, tls) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def with_status(status: int, body: bytes = b"", **headers: str) -> Callable[[Handler], None]:
    def answer(handler: Handler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def post(server: Server, header_file: str = "", seconds: float = SOON_SECONDS) -> Outcome:
    return webhooks.post(server.url, header_file, TEXT, seconds)


def test_a_webhook_gets_the_object_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """By no proxy of the environment."""
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with serving(with_status(204)) as server:
        assert post(server) == Outcome()
    ((path, headers, body),) = server.got
    assert (path, json.loads(body)) == ("/secret-path", json.loads(TEXT))
    assert headers["Content-Type"] == "application/json"
    assert "Authorization" not in headers


@pytest.mark.parametrize(
    ("status", "may_pass"),
    [(500, True), (503, True), (429, True), (400, False), (401, False), (404, False)],
)
def test_only_what_may_pass_is_worth_another_try(status: int, may_pass: bool) -> None:
    with serving(with_status(status, b"not \x1b[1mnow")) as server:
        outcome = post(server)
    assert outcome.may_pass is may_pass
    assert outcome.output == "not [1mnow"
    assert outcome.problem == f"http://127.0.0.1:{server.server_port} answered {status}"


def test_a_redirect_is_not_followed(tmp_path: Path) -> None:
    """Its keys would go with it."""
    with serving(with_status(200)) as other:
        with serving(with_status(307, Location=other.url)) as server:
            outcome = post(server)
        assert other.got == []
    assert "307; redirects are not followed" in outcome.problem
    assert not outcome.may_pass


def test_no_more_of_an_answer_is_read_than_is_shown() -> None:
    with serving(with_status(500, b"x" * 10_000_000)) as server:
        assert len(post(server).output) <= 512


def drip(first: bytes, piece: bytes) -> Callable[[Handler], None]:
    """Never long without a byte, and never at an end: for twice as long as we would wait."""

    def answer(handler: Handler) -> None:
        with contextlib.suppress(OSError):
            handler.wfile.write(first)
            for _ in range(int(SOON_SECONDS * 2 / 0.05)):
                handler.wfile.write(piece)
                time.sleep(0.05)

    return answer


@pytest.mark.parametrize("piece", [b"", b"x"], ids=["never", "slowly"])
@pytest.mark.parametrize("first", [b"", b"HTTP/1.1 200 OK\r\nX-Y: "], ids=["status", "header"])
def test_one_that_does_not_get_to_an_end_is_left_in_time(first: bytes, piece: bytes) -> None:
    with serving(drip(first, piece)) as server:
        began = time.monotonic()
        outcome = post(server, seconds=0.5)
    assert time.monotonic() - began < SOON_SECONDS
    assert outcome.problem == f"http://127.0.0.1:{server.server_port} gave no answer within 0.5 s"
    assert outcome.may_pass


def test_a_body_that_comes_slowly_is_not_waited_for() -> None:
    def answer(handler: Handler) -> None:
        with_status(500, b"x")(handler)
        drip(b"", b"")(handler)

    with serving(answer) as server:
        began = time.monotonic()
        assert "answered 500" in post(server, seconds=0.5).problem
    assert time.monotonic() - began < SOON_SECONDS


def test_nobody_there_is_worth_another_try() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/secret-path"
        outcome = webhooks.post(url, "", TEXT, SOON_SECONDS)
    assert outcome.may_pass
    assert "Connection refused" in outcome.problem
    assert "secret" not in outcome.problem


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Signed by nobody."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl to make a certificate with")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", str(path), "-out", f"{path}.crt"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


def test_a_certificate_that_nobody_signed_gets_nothing(
    certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the environment says of trusting it."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    with serving(with_status(200), certificate) as server:
        outcome = post(server)
    assert server.got == []
    assert "self-signed certificate" in outcome.problem
    assert not outcome.may_pass


# --- keys ----------------------------------------------------------------------------------------


def header_file(folder: Path, text: str, mode: int = 0o600) -> str:
    path = folder / "headers"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_header_lines_go_with_it(tmp_path: Path) -> None:
    path = header_file(tmp_path, "# of the relay\n\nAuthorization: Bearer sesame\nX-Team:  a b \n")
    with serving(with_status(200)) as server:
        assert post(server, path) == Outcome()
    ((_, headers, _),) = server.got
    assert (headers["Authorization"], headers["X-Team"]) == ("Bearer sesame", "a b")


@pytest.mark.parametrize(
    ("text", "mode", "says"),
    [
        ("Authorization: Bearer sesame\n", 0o640, "chmod 600"),
        ("Authorization: Bearer sesame\n", 0o602, "chmod 600"),
        ("Bearer sesame\n", 0o600, "line 1: is not `Name: value`"),
        ("A: b\nX: sesame\x07\n", 0o600, "line 2: is not `Name: value`"),
        ("X: sesame\xe9\n", 0o600, "line 1"),
        ("Host: sesame\n", 0o600, "Host is not for you to set"),
        ("X: sesame\n" * 5000, 0o600, "is larger than"),
    ],
)
def test_a_header_file_that_is_wrong_is_named_and_never_quoted(
    tmp_path: Path, text: str, mode: int, says: str
) -> None:
    path = header_file(tmp_path, text, mode)
    with serving(with_status(200)) as server:
        outcome = post(server, path)
    assert server.got == []
    assert says in outcome.problem
    assert path in outcome.problem
    assert "sesame" not in outcome.problem
    assert not outcome.may_pass


def test_a_header_file_that_is_none_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    for path in (pipe, tmp_path / "nothing", tmp_path):
        with pytest.raises(ConfigError, match=str(path)):
            hooks.read_headers(path)


def test_what_keeps_hooks_from_working_is_found_beforehand(command: Command) -> None:
    command.write("exit 0")
    good = header_file(command.folder, "X: y\n")
    assert hooks.problems((str(command.path),), good) == ()
    assert hooks.problems((), "") == ()
    command.path.chmod(0o722)
    (one, other) = hooks.problems((str(command.path),), str(command.folder / "nothing"))
    assert "chmod go-w" in one
    assert "nothing" in other
