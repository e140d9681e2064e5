"""`synapse doctor` on a deployment that runs, on one that was killed, and on damaged content."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.gguf_factory import write_model
from tests.integration.harness import Deployment, deployed, stranger_on, wait_until
from tests.integration.hub import serving
from tests.ports import free_ports


@pytest.fixture(scope="module")
def running() -> Iterator[Deployment]:
    """Two models that are ready, behind a gateway where there is a HAProxy."""
    with deployed(f"[gateway]\nbind = 127.0.0.1:{free_ports(1)}\n") as deployment:
        deployment.add("a", "b")
        deployment.synapse("up", "--detach")
        deployment.wait_ready()
        if shutil.which("haproxy"):
            wait_until(
                lambda: "RUNNING" in deployment.ctl("status", "gateway", expect=None).out, 15
            )
        yield deployment


def findings(deployment: Deployment, *arguments: str, expect: int | None = 0) -> dict[str, Any]:
    """What `doctor --json` has found, by id; every check came to an end."""
    value = deployment.synapse("doctor", "--json", *arguments, expect=expect).json()
    assert not [one for one in value["findings"] if one["id"].startswith("check-")]
    return {one["id"]: one for one in value["findings"]}


@contextmanager
def process(deployment: Deployment, *arguments: str, record: str = "") -> Iterator[int]:
    """A process that does nothing, and looks like a llama-server with these arguments."""
    program = deployment.root / "llama-server"
    if not program.exists():
        program.symlink_to(sys.executable)
    command = [str(program), "-c", "import time; time.sleep(300)", *arguments]
    environment = os.environ | ({"SYNAPSE_RECORD": record} if record else {})
    with subprocess.Popen(command, env=environment, start_new_session=True) as started:
        try:
            yield started.pid
        finally:
            started.kill()


def test_a_fleet_that_is_well_gets_no_warning_and_soon(running: Deployment) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = running.synapse("doctor")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 3, "seconds of a processor, of which there may be few"
    assert "ERROR" not in done.out
    assert "WARNING" not in done.out
    assert done.out.isascii()


def test_a_server_that_nobody_looks_after_is_found(running: Deployment) -> None:
    """By the run that its environment names; another's server is a note."""
    record = str(running.prefix / "var" / "run" / "a.run")
    with process(running, record=record) as orphan, process(running, "--port", "9") as other:
        found = findings(running)
        assert found["server-orphaned"]["subject"] == f"llama-server (pid {orphan})"
        assert "a run of a that no supervisord looks after" in found["server-orphaned"]["message"]
        assert found["servers-of-others"]["severity"] == "note"
        assert f"pid {other} (port 9)" in found["servers-of-others"]["subject"]


def test_a_key_in_a_command_line_is_found_and_not_shown(running: Deployment) -> None:
    with process(running, "--api-key", "s3cret") as shown:
        done = running.synapse("doctor")
        assert f"(pid {shown}): was started with --api-key" in done.out
        assert "s3cret" not in done.text


def test_a_block_that_supervisord_does_not_hold_is_named(running: Deployment) -> None:
    """One that is new, and one that was edited; each says which command takes it up."""
    added, edited = running.conf_d / "new.conf", running.conf_d / "a.conf"
    before = edited.read_text()
    added.write_text("[program:new]\ncommand=/bin/true\nautostart=false\n")
    edited.write_text(before.replace("--parallel 4", "--parallel 2"))
    found = findings(running)
    added.unlink()
    edited.write_text(before)
    for name, path in (("block-unknown", added), ("block-not-taken-up", edited)):
        assert found[name]["subject"] == str(path)
        assert "supervisorctl update" in found[name]["mend"]
    assert "block-edited" in found


def test_a_listener_that_is_down_is_an_error(running: Deployment) -> None:
    running.ctl("stop", "synapse")
    found = findings(running, expect=1)
    running.ctl("start", "synapse")
    assert found["listener-down"]["severity"] == "error"
    wait_until(lambda: "listener-down" not in findings(running, expect=None), 30)


def test_damage_at_the_same_size_is_found_and_mended_as_said(running: Deployment) -> None:
    """The blob is removed and pulled again; then its content is what was downloaded."""
    with serving() as hub:
        running.extra_environment = hub.environment()
        content = write_model(running.sources / "p.gguf", seed=7).read_bytes()
        hub.add("acme/pulled", {"pulled-Q8_0.gguf": content})
        running.synapse("pull", "acme/pulled")
        (blob,) = (running.hub.repo("acme/pulled") / "blobs").iterdir()
        with blob.open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(b"damaged")
        damaged = findings(running, "--deep", expect=1)["blob-damaged"]
        assert damaged["subject"] == "acme/pulled/pulled-Q8_0.gguf"
        assert f"rm {blob}" in damaged["mend"]
        assert "synapse pull acme/pulled:pulled-Q8_0" in damaged["mend"]
        blob.unlink()
        running.synapse("pull", "acme/pulled:pulled-Q8_0")
        assert "blob-damaged" not in findings(running, "--deep")
        assert blob.read_bytes() == content
    running.extra_environment = {}


def test_what_a_killed_supervisord_leaves_is_told(running: Deployment) -> None:
    """Last, as it ends the fleet: stale files, a port that a stranger took, a missing plugin."""
    port = running.model("a")["port"]
    running.supervisord().send_signal(signal.SIGKILL)
    wait_until(lambda: not running.processes(), 30, "all gone")
    with stranger_on(port):
        found = findings(running)
    assert found["supervisord-down"]["severity"] == "note"
    assert {"socket-stale", "pidfile-stale"} <= set(found)
    assert found["port-taken"]["subject"] == "a"
    assert f"its port {port} is taken by 'p" in found["port-taken"]["message"]  # by this Python
    main_file = running.etc / "supervisord.conf"
    main_file.write_text(main_file.read_text().replace("[rpcinterface:synapse]", "[x:synapse]"))
    running.start_supervisord()
    found = findings(running, expect=1)
    assert {"plugin-missing", "section-missing"} <= set(found)
    assert found["section-missing"]["lines"][0] == "[rpcinterface:synapse]"
