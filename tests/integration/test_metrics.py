"""/metrics of a real supervisord with a password: who is let in, and what it tells of a failure."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from prometheus_client.parser import text_string_to_metric_families
from supervisor.xmlrpc import UnixStreamHTTPConnection

from tests.conftest import Engine
from tests.integration.harness import Deployment, chat, deployed, http, wait_until

LOGIN = ("synapse", "secret")
_SETTINGS = "[probe]\nperiod_seconds = 1\n[restart]\nbackoff_initial_seconds = 5"
_FIGURES_SECONDS = 30.0  # they are handed over every 5 s

Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Stage:
    """A deployment, and where its page is."""

    at: Deployment
    url: str

    def scrape(self) -> dict[tuple[str, Labels], float]:
        """Each sample by name and labels, as Prometheus' own parser reads them."""
        status, body = http(f"{self.url}/metrics", login=LOGIN)
        assert status == 200, body
        return {
            (sample.name.removeprefix("synapse_"), frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(body.decode("utf-8", "strict"))
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float | None:
        return self.scrape().get((name, frozenset(labels.items())))

    def failures(self) -> float | None:
        return self.value("model_failures_total", model="alpha", **{"class": "crashed"})

    def phase(self) -> str:
        """The phase that alpha is in, by the metric."""
        (found,) = (
            dict(labels)["phase"]
            for name, labels in self.scrape()
            if name == "model_phase" and dict(labels)["model"] == "alpha"
        )
        return found


@pytest.fixture(scope="module")
def stage(llama_server: Engine) -> Iterator[Stage]:
    """Two models; the web server asks for a password."""
    with deployed(_SETTINGS) as at:
        at.add("alpha", "beta")
        at.synapse("init")
        url = at.open_web_server()
        with (at.etc / "supervisord.conf").open("a") as main_file:
            main_file.write("username={}\npassword={}\n".format(*LOGIN))
        at.synapse("up", "--detach")
        at.wait_for_rows({"alpha": "ready", "beta": "ready"})
        yield Stage(at, url)


def test_nobody_is_let_in_without_the_password(stage: Stage) -> None:
    for login in (None, ("synapse", "wrong"), ("", "")):
        status, body = http(f"{stage.url}/metrics", login=login)
        assert status == 401
        assert b"synapse_" not in body
    assert http(f"{stage.url}/metrics", login=LOGIN)[0] == 200


def test_the_owner_needs_no_web_server(stage: Stage) -> None:
    connection = UnixStreamHTTPConnection("localhost", timeout=10)
    connection.socketfile = str(stage.at.prefix / "var" / "run" / "supervisor.sock")
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        assert b"\nsynapse_up 1\n" in connection.getresponse().read()


def test_only_get_is_answered_whatever_the_address_says(stage: Stage) -> None:
    assert http(f"{stage.url}/metrics", {}, login=LOGIN)[0] == 405
    assert http(f"{stage.url}/metrics?REQUEST_METHOD=POST", login=LOGIN)[0] == 200
    assert http(f"{stage.url}/metrics/", login=LOGIN)[0] == 404
    assert http(f"{stage.url}/index.html", login=LOGIN)[0] == 200


def test_a_fleet_in_good_health_tells_so(stage: Stage) -> None:
    samples = stage.scrape()
    assert samples["up", frozenset()] == 1
    assert samples["snapshot_unreadable", frozenset()] == 0
    for name in ("alpha", "beta"):
        one = frozenset({("model", name)})
        assert samples["model_ready", one] == samples["model_enabled", one] == 1
        assert 0 < samples["model_load_seconds", one] < 60
        assert abs(time.time() - samples["model_start_time_seconds", one]) < 600
    assert samples["device_up", frozenset({("device", "CPU")})] == 1
    assert samples["device_total_bytes", frozenset({("device", "CPU")})] > 2**28


def test_tokens_that_are_written_are_counted(stage: Stage) -> None:
    before = stage.value("model_generated_tokens_total", model="beta") or 0
    chat(stage.at.rows()["beta"])

    def has_grown() -> bool:
        return (stage.value("model_generated_tokens_total", model="beta") or 0) >= before + 1

    wait_until(has_grown, _FIGURES_SECONDS, "tokens counted")


def test_a_crash_is_counted_by_its_class_and_seen_to_heal(stage: Stage) -> None:
    """Last: it leaves its traces in the counters."""
    assert (stage.failures(), stage.phase()) == (0, "ready")
    restarts = stage.value("model_restarts_total", model="alpha")
    assert restarts is not None
    server = stage.at.servers()["alpha"]
    os.kill(server.pid, signal.SIGKILL)
    wait_until(lambda: stage.phase() == "backoff", 30, "backoff")
    assert stage.value("model_ready", model="alpha") == 0
    assert stage.value("model_next_retry_seconds", model="alpha") is not None
    assert stage.failures() == 1
    wait_until(lambda: stage.value("model_ready", model="alpha") == 1, 60, "ready again")
    assert stage.phase() == "ready"
    assert (stage.failures(), stage.value("model_restarts_total", model="alpha")) == (
        1, restarts + 1,
    )  # fmt: skip
    assert stage.value("model_failures_total", model="beta", **{"class": "crashed"}) == 0
