"""As a service: `synapse up` under an init that sends TERM, and a back end on the other side of the
inet server.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.harness import (
    Deployment,
    Foreground,
    TokenStream,
    deployed,
    foreground,
    wait_until,
)
from tests.ports import free_ports

BACKEND = Path(__file__).resolve().parents[2] / "docs" / "examples" / "backend.py"
LOGIN = ("synapse", "correct horse battery staple")

pytestmark = pytest.mark.usefixtures("llama_server")


@pytest.fixture(scope="module")
def web_port() -> int:
    return free_ports(1)


@pytest.fixture(scope="module")
def service(web_port: int) -> Iterator[tuple[Deployment, Foreground]]:
    """A model under `synapse up`, and the inet server with a password that the file only hashes."""
    with deployed() as deployment:
        deployment.add("tiny", layers=16, feed_forward=1024)  # about 150 tokens a second
        deployment.synapse("init")
        hashed = hashlib.sha1(LOGIN[1].encode(), usedforsecurity=False).hexdigest()
        with (deployment.etc / "supervisord.conf").open("a") as main_file:
            main_file.write(
                f"\n[inet_http_server]\nport=127.0.0.1:{web_port}\n"
                f"username={LOGIN[0]}\npassword={{SHA}}{hashed}\n"
            )
        with foreground(deployment, "up", terminal=False) as up:
            up.wait_for("Ctrl-C stops everything")
            yield deployment, up


@pytest.mark.parametrize(("password", "status"), [(LOGIN[1], 0), ("password", 1)])
def test_a_back_end_needs_the_password_that_the_file_only_hashes(
    service: tuple[Deployment, Foreground], web_port: int, password: str, status: int
) -> None:
    deployment, _ = service
    file = deployment.root / "password"
    file.write_text(f"{password}\n")
    deployment.extra_environment = {
        "SYNAPSE_URL": f"http://127.0.0.1:{web_port}/RPC2", "SYNAPSE_PASSWORD_FILE": str(file),
    }  # fmt: skip
    try:
        done = deployment.run(sys.executable, str(BACKEND), "models", expect=status)
    finally:
        deployment.extra_environment = {}
    assert ("tiny ready" in done.text) is (status == 0)
    assert ("401" in done.text) is (status == 1)


def test_a_reload_is_not_taken_for_the_end(service: tuple[Deployment, Foreground]) -> None:
    deployment, up = service
    before = deployment.rows()["tiny"]["pid"]
    deployment.ctl("reload")
    wait_until(lambda: deployment.rows().get("tiny", {}).get("pid", before) != before, 40, "anew")
    deployment.wait_for_rows({"tiny": "ready"})
    assert up.process.poll() is None


def test_term_drains_and_leaves_nothing_and_is_no_failure(
    service: tuple[Deployment, Foreground],
) -> None:
    """As `docker stop`, systemd and launchd send it. Last: the deployment is over then."""
    deployment, up = service
    stream = TokenStream(deployment.models()["tiny"]["url"], 300)
    up.process.send_signal(signal.SIGTERM)
    assert up.end() == 0
    stream.end()
    assert stream.complete
    assert "drained=1, cut=0" in deployment.log_of("tiny")


def test_a_supervisord_that_was_killed_is_a_failure_for_whoever_waits_for_it() -> None:
    """So an init that looks at the exit status starts it again."""
    with deployed() as deployment:
        deployment.add("tiny")
        with foreground(deployment, "up", terminal=False) as up:
            up.wait_for("Ctrl-C stops everything")
            with deployment.rpc() as server:
                os.kill(server.supervisor.getPID(), signal.SIGKILL)
            assert up.end() == 1
            assert "supervisord was killed by signal 9" in up.said
