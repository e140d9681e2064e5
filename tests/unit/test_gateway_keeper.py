"""The gateway as the listener looks after it: a real supervisord, a real HAProxy, stub models."""

from __future__ import annotations

import contextlib
import http.client as http_client
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.adapters.haproxy import Runtime
from supervisor_synapse.adapters.supervisord import Process, Supervisord
from supervisor_synapse.core.gateway import Verdict
from supervisor_synapse.core.model import Phase, ProcessState
from supervisor_synapse.core.settings import GatewaySettings
from supervisor_synapse.errors import ShuttingDown, TransientError
from supervisor_synapse.gateway import PROGRAM, Gateway, View
from supervisor_synapse.gateway_files import Files
from tests.gateways import IS_THERE, StubServer, children_of, programs
from tests.integration.harness import holds_for, stranger_on, wait_until
from tests.ports import free_ports
from tests.unit.builders import row

pytestmark = pytest.mark.skipif(not IS_THERE, reason="haproxy is not installed")

MAIN = """[unix_http_server]
file={prefix}/var/run/supervisor.sock
[supervisord]
logfile={prefix}/var/log/supervisord.log
pidfile={prefix}/var/run/supervisord.pid
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
[include]
files=conf.d/*.conf
"""
STRANGER = "[program:gateway]\ncommand=/bin/sleep 1000\nstopwaitsecs=1\n"


@dataclass(slots=True)
class Kept:
    """A deployment with models `a` and `b`, of which `names` are known, and its gateway."""

    at: Deployment
    servers: dict[str, StubServer]
    settings: GatewaySettings
    supervisord: subprocess.Popen[bytes] | None = None
    names: tuple[str, ...] = ("a", "b")
    phases: dict[str, Phase] = field(default_factory=dict)
    keeper: Any = None
    turns: int = 0

    @property
    def config(self) -> Path:
        return self.at.gateway_config

    @property
    def block(self) -> Path:
        return self.at.block(PROGRAM)

    @property
    def rpc(self) -> Supervisord:
        return Supervisord(self.at.socket)

    @property
    def process(self) -> Process | None:
        return self.rpc.process(PROGRAM)

    @property
    def runtime(self) -> Runtime:
        return Runtime(self.at.gateway_socket)

    def pid(self) -> int:
        """Of the worker that answers; 0 while none does."""
        with contextlib.suppress(TransientError):
            return self.runtime.pid()
        return 0

    def turn(self) -> bool:
        """One look of the listener's, at a world that has changed a little."""
        self.turns += 1
        ports = {name: self.servers[name].port for name in self.names}
        found = tuple(replace(one, port=ports[one.name]) for one in programs(*self.names))
        rows = tuple(
            row(
                name=name, port=ports[name], restarts=self.turns,
                phase=self.phases.get(name, Phase.READY),
            )
            for name in self.names
        )  # fmt: skip
        verdicts = dict.fromkeys(self.names, Verdict("serve"))
        self.keeper.look(View(self.settings, found, rows, verdicts, self.process))
        return True

    def until(self, reached: Callable[[], object], seconds: float = 20, what: str = "") -> Any:
        """Turns, until it is so."""

        def turned() -> object:
            self.turn()
            return reached()

        return wait_until(turned, seconds, what)

    def status(self, name: str, **headers: str) -> int:
        """Of a request for a model; 0 where nobody answers."""
        link = http_client.HTTPConnection("127.0.0.1", self.settings.port, timeout=10)
        with contextlib.closing(link):
            try:
                link.request("GET", f"/model/{name}/props", None, headers)
                return link.getresponse().status
            except (OSError, http_client.HTTPException):
                return 0

    def serves(self, *names: str) -> bool:
        return all(self.status(name) == 200 for name in names or self.names)

    def start(self) -> None:
        (self.at.etc / "supervisord.conf").write_text(MAIN.format(prefix=self.at.prefix))
        self.supervisord = subprocess.Popen(
            [sys.executable, "-m", "supervisor.supervisord", "-n", "-c", str(self.at.main_config)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_until(self.rpc.is_up, 20, "supervisord answers")
        self.keeper = Gateway(self.at)

    def close(self) -> None:
        if self.supervisord is not None:
            with contextlib.suppress(TransientError, ShuttingDown):
                self.rpc.shutdown()
            try:
                self.supervisord.wait(20)
            except subprocess.TimeoutExpired:
                self.supervisord.kill()
                self.supervisord.wait(20)
        wait_until(lambda: not of(self.at.prefix), 10, "nothing is left")


def of(prefix: Path) -> list[int]:
    """Processes that have this folder in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and os.fsencode(prefix) in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def shared() -> Iterator[Kept]:
    with keeping() as found:
        found.start()
        yield found


@pytest.fixture
def kept(shared: Kept) -> Kept:
    """Both models served, with nothing edited, by a listener that has just begun."""
    shared.names, shared.phases = ("a", "b"), {}
    shared.settings = GatewaySettings(port=shared.settings.port, hold_seconds=5)
    for path in (shared.config, shared.block):
        for ending in (".new", ".rejected", ".old"):
            path.with_name(path.name + ending).unlink(missing_ok=True)
    for path in (shared.config, shared.block):
        if not Files(shared.at).is_ours(path):
            path.unlink(missing_ok=True)
    shared.keeper = Gateway(shared.at)
    shared.until(shared.serves)
    return shared


@contextlib.contextmanager
def keeping(prefix: str = "p") -> Iterator[Kept]:
    root = Path(tempfile.mkdtemp(prefix="gk", dir="/tmp"))
    deployment = Deployment(root / prefix)
    for folder in deployment.folders():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    servers = {name: StubServer(name) for name in ("a", "b")}
    found = Kept(deployment, servers, GatewaySettings(port=free_ports(1), hold_seconds=5))
    try:
        yield found
    finally:
        try:
            found.close()
        finally:
            for server in servers.values():
                server.close()
            shutil.rmtree(root)


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(str(getattr(record, "reason", "")) for record in caplog.records)


# --- it comes, and it goes -----------------------------------------------------------------------


def test_it_comes_up_by_itself_follows_the_models_and_cuts_no_stream(kept: Kept) -> None:
    """Loading a new model's backend ends no request; a moved port loads nothing anew."""
    kept.names = ("a",)
    kept.until(lambda: kept.status("b") == 404)
    link = http_client.HTTPConnection("127.0.0.1", kept.settings.port, timeout=20)
    with contextlib.closing(link):
        link.request("GET", "/model/a/stream/3")
        stream = link.getresponse()
        assert stream.readline() == b"data: 0\n"
        first = kept.pid()
        kept.names = ("a", "b")
        kept.until(lambda: kept.serves("b"), what="a new model")
        assert kept.pid() != first
        second = kept.pid()
        moved = kept.servers["b"] = StubServer("b")
        kept.until(lambda: moved.asked or kept.serves("b"), what="the new port")
        kept.until(lambda: moved.asked or not kept.serves("b"), what="the new port")
        assert kept.pid() == second, "nothing was loaded anew"
        assert f":{moved.port} " in kept.config.read_text()
        kept.servers["a"].go_on.set()
        assert stream.read().endswith(b"data: 2\n\n")
    kept.names = ("a",)
    kept.until(lambda: kept.status("b") == 404, what="it is gone")


def test_it_goes_when_it_is_switched_off_and_comes_back_when_switched_on(kept: Kept) -> None:
    kept.settings = replace(kept.settings, enabled=False)
    kept.until(lambda: kept.process is None, what="supervisord has it no more")
    assert not kept.block.exists()
    assert kept.rpc.reread().changed == frozenset()
    kept.settings = replace(kept.settings, enabled=True)
    kept.until(kept.serves)


def test_one_that_was_stopped_by_hand_stays_stopped(kept: Kept) -> None:
    kept.rpc.stop(PROGRAM)
    kept.until(lambda: kept.process and kept.process.state is ProcessState.STOPPED)
    for _ in range(5):
        kept.turn()
    assert kept.process is not None
    assert kept.process.state is ProcessState.STOPPED
    kept.rpc.start(PROGRAM)
    kept.until(kept.serves)


def test_a_prefix_with_a_blank_is_served_as_well() -> None:
    with keeping("my models") as kept:
        kept.start()
        kept.until(kept.serves)
        kept.names = ("a",)
        kept.until(lambda: kept.status("b") == 404)


# --- a program of somebody else's ----------------------------------------------------------------


@pytest.mark.parametrize(("where", "enabled"), [("gateway.conf", True), ("mine.conf", False)])
def test_a_program_of_the_same_name_that_is_not_ours_is_never_touched(
    where: str, enabled: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    with keeping() as kept, caplog.at_level(logging.INFO, "synapse"):
        theirs = kept.at.blocks / where
        theirs.write_text(STRANGER)
        kept.settings = replace(kept.settings, enabled=enabled)
        kept.start()
        wait_until(lambda: kept.process and kept.process.state is ProcessState.RUNNING, 10)
        before = kept.process
        assert before is not None
        assert holds_for(kept.turn, 2.5)  # long enough to take it for frozen
        after = kept.process
        assert after is not None
        assert (after.pid, after.state) == (before.pid, ProcessState.RUNNING)
        assert theirs.read_text() == STRANGER
        assert [path.name for path in kept.at.blocks.iterdir()] == [where]
        assert ("is not ours" in said(caplog)) is (enabled is not False)
        kept.rpc.stop(PROGRAM)
        wait_until(lambda: kept.process and kept.process.pid == 0, 10)
        assert holds_for(kept.turn, 1)
        assert kept.process is not None
        assert kept.process.pid == 0, "nor started"


# --- edits by hand -------------------------------------------------------------------------------


def test_an_edit_that_haproxy_takes_is_kept_and_in_effect_with_ours_beside(kept: Kept) -> None:
    edited = kept.config.read_text().replace("path /health }", "path /alive }")
    kept.config.write_text(edited)
    kept.until(lambda: kept.config.with_name("haproxy.cfg.new").exists())
    beside = kept.config.with_name("haproxy.cfg.new").read_text()
    assert "path /health }" in beside
    kept.until(lambda: answer(kept, "/alive") == 200, what="it is in effect")
    moved = kept.servers["b"] = StubServer("b")
    kept.until(
        lambda: kept.serves("b") and moved.asked, what="a moved port is followed all the same"
    )
    assert kept.config.read_text() == edited


def answer(kept: Kept, path: str) -> int:
    link = http_client.HTTPConnection("127.0.0.1", kept.settings.port, timeout=10)
    with contextlib.closing(link):
        link.request("GET", path)
        return link.getresponse().status


def test_an_edit_that_haproxy_does_not_take_is_set_aside_and_it_serves_on(
    kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    good = kept.config.read_text()
    kept.config.write_text(good + "    nonsense keyword\n")
    with caplog.at_level(logging.INFO, "synapse"):
        kept.until(lambda: kept.config.with_name("haproxy.cfg.rejected").exists())
    assert kept.config.read_text() == good
    assert "nonsense" in said(caplog)
    assert kept.serves()


def test_a_file_that_is_still_being_written_is_let_alone(kept: Kept) -> None:
    for part in range(8):
        kept.config.write_text("global\n" + "# saving\n" * part)
        assert holds_for(kept.turn, 0.3)
        assert not kept.config.with_name("haproxy.cfg.rejected").exists()


def test_a_block_that_was_edited_is_kept_and_a_broken_one_is_set_aside(kept: Kept) -> None:
    ours = kept.block.read_text()
    edited = ours.replace("stopwaitsecs=15", "stopwaitsecs=16")
    kept.block.write_text(edited)
    assert holds_for(kept.turn, 2.5)
    assert kept.block.read_text() == edited
    for broken in (edited.replace("priority=50", "priority=high"), "[program:gateway\n"):
        kept.block.write_text(broken)
        kept.until(lambda: kept.block.read_text() == ours, what="ours is back")
        assert kept.block.with_name("gateway.conf.rejected").read_text() == broken
        assert kept.serves()


def test_an_edited_block_lies_beside_once_the_gateway_is_switched_off(kept: Kept) -> None:
    edited = kept.block.read_text() + "; mine\n"
    kept.block.write_text(edited)
    kept.settings = replace(kept.settings, enabled=False)
    kept.until(lambda: kept.process is None)
    assert kept.block.with_name("gateway.conf.old").read_text() == edited


def test_a_listener_that_died_between_two_writes_takes_nothing_for_an_edit(kept: Kept) -> None:
    mark = kept.at.gateway / "haproxy.cfg.sha256"
    kept.settings = replace(kept.settings, max_connections=77)
    before = kept.config.read_text()
    kept.until(lambda: "maxconn 154" in kept.config.read_text())
    assert len(mark.read_text().split()) == 2
    kept.config.write_text(before)  # as if the second write had not come
    kept.keeper = Gateway(kept.at)
    kept.until(lambda: "maxconn 154" in kept.config.read_text(), what="it goes on")
    assert not kept.config.with_name("haproxy.cfg.new").exists()


# --- keys ----------------------------------------------------------------------------------------


def test_keys_that_are_missing_or_not_private_are_told_and_what_runs_goes_on(
    kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    keys = kept.at.etc / "keys"
    first = kept.pid()
    kept.settings = replace(kept.settings, api_key_file=str(keys))
    with caplog.at_level(logging.INFO, "synapse"):
        kept.until(lambda: "keys: cannot read it" in said(caplog))
        keys.write_text("one\n")
        keys.chmod(0o644)
        kept.until(lambda: f"chmod 600 {keys}" in said(caplog))
    kept.names = ("a",)
    assert holds_for(lambda: kept.turn() and kept.status("a") == 200, 1)
    assert kept.pid() == first
    keys.chmod(0o600)
    kept.until(lambda: kept.status("a") == 401, what="keys are asked for")
    assert kept.status("a", Authorization="Bearer one") == 200


def test_a_key_that_is_taken_back_opens_nothing_any_more(kept: Kept) -> None:
    keys = kept.at.etc / "keys"
    keys.write_text("# ours\none\ntwo\n")
    keys.chmod(0o600)
    kept.settings = replace(kept.settings, api_key_file=str(keys))
    kept.until(lambda: kept.status("a") == 401)
    assert kept.status("a", Authorization="Bearer one") == 200
    assert kept.status("a", Authorization="Bearer # ours") == 401
    assert kept.status("a", Authorization="Bearer ") == 401
    keys.write_text("two\n")
    kept.until(lambda: kept.status("a", Authorization="Bearer one") == 401)
    assert kept.status("a", Authorization="Bearer two") == 200


# --- what goes wrong -----------------------------------------------------------------------------


def test_a_port_that_is_taken_is_told_with_who_has_it_and_taken_when_it_is_free(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with keeping() as kept, caplog.at_level(logging.INFO, "synapse"):
        kept.start()
        with stranger_on(kept.settings.port):
            kept.until(lambda: "in use" in said(caplog), 30)
            assert f"{kept.settings.port}" in said(caplog)
            assert f"pid {os.getpid()}" in said(caplog)
        kept.until(kept.serves, 40)


def test_a_new_port_that_is_taken_leaves_the_gateway_where_it_was(
    kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    before = kept.settings.port
    port = free_ports(1)
    with stranger_on(port), caplog.at_level(logging.INFO, "synapse"):
        kept.settings = replace(kept.settings, port=port)
        kept.until(lambda: "stays where it is" in said(caplog))
        assert f"127.0.0.1:{port}" in said(caplog)
        kept.settings = replace(kept.settings, port=before)
        assert kept.serves()
    kept.settings = replace(kept.settings, port=port)
    kept.until(kept.serves, 40, "it has moved")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda one: one.name)
def test_a_worker_that_is_killed_or_frozen_is_replaced(kept: Kept, number: int) -> None:
    worker = kept.pid()
    os.kill(worker, number)
    kept.until(lambda: kept.pid() not in (0, worker) and kept.serves(), 30)


def test_a_new_worker_knows_who_is_on_the_way_out_and_nobody_stays_taken_out(kept: Kept) -> None:
    """A reload forgets what the launcher said; a launcher may not have been heard."""
    kept.runtime.drain("a")
    kept.phases["a"] = Phase.DRAINING
    before = kept.pid()
    kept.settings = replace(kept.settings, hold_seconds=6)
    kept.until(lambda: kept.pid() not in (0, before))
    kept.until(lambda: kept.runtime.servers()["a"].is_draining)
    kept.phases["a"] = Phase.READY
    kept.until(lambda: not kept.runtime.servers()["a"].is_draining, what="it is brought back")
    assert kept.serves()


def test_a_haproxy_that_was_removed_while_it_runs_runs_on(
    kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    binary = shutil.which("haproxy")
    assert binary is not None
    mine = tmp_path / "haproxy"
    mine.symlink_to(binary)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    kept.keeper = Gateway(kept.at)
    kept.until(lambda: str(mine) in kept.block.read_text())
    mine.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.INFO, "synapse"):
        assert holds_for(lambda: kept.turn() and kept.serves(), 2)
    assert "haproxy" in said(caplog)


def test_a_haproxy_that_does_not_fit_is_named_where_a_gateway_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    old = tmp_path / "haproxy"
    old.write_text("#!/bin/sh\necho HAProxy version 2.2.9\n")
    old.chmod(0o755)
    with keeping() as kept, caplog.at_level(logging.INFO, "synapse"):
        kept.start()
        monkeypatch.setenv("PATH", str(tmp_path))
        kept.turn()
        assert said(caplog) == ""
        kept.settings = replace(kept.settings, enabled=True)
        kept.turn()
        assert "older than 2.6" in said(caplog)
        assert list(kept.at.blocks.iterdir()) == []


def test_the_death_of_supervisord_leaves_no_haproxy() -> None:
    with keeping() as kept:
        kept.start()
        kept.until(kept.serves)
        assert kept.supervisord is not None
        assert children_of(kept.supervisord.pid)
        kept.supervisord.kill()
        wait_until(lambda: not of(kept.at.prefix), 10, "all are gone")
        assert kept.status("a") == 0
