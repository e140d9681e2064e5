"""Each check of `synapse doctor`: one thing is wrong in a deployment, and what is said of it."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from supervisor_synapse import deploy, doctor, report
from supervisor_synapse.adapters import snapshots
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.core.findings import Examination, Finding, Severity, fine, note
from supervisor_synapse.core.model import (
    Failure,
    FailureClass,
    ListenerRow,
    Phase,
    ProcessState,
    Snapshot,
)
from supervisor_synapse.doctor import Check, network
from supervisor_synapse.doctor.case import Case
from supervisor_synapse.version import VERSION
from tests.gguf_factory import HubCache, hub_cache, write_model
from tests.unit.builders import FLAGS, row
from tests.unit.rpc_server import answering, process_info

CHECKOUT = Path(__file__).resolve().parents[2]
BLOCK = (
    "[program:a]\ncommand={launcher} --record r -- {engine} --model {model} --host {host} "
    '--port 18100 {more}\nenvironment=A="1"{variables}\n'
)


class Patient:
    """A deployment that is well, to be made ill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.deployment = Deployment(folder / "p")
        self.hub: HubCache = hub_cache(folder / "hub")
        self.engine = folder / "llama-server"
        self.write_engine()
        deploy.initialize(self.deployment)
        self.configure()

    def write_engine(self, *, devices: str = "", flags: frozenset[str] = FLAGS) -> None:
        listed = " ".join(sorted(flags | {"--list-devices", "--fit"}))
        self.engine.write_text(
            f"#!/bin/sh\ncase $1 in --list-devices) echo '{devices}';; "
            f"*) echo 'version: 1'; echo '{listed}';; esac\n"
        )
        self.engine.chmod(0o700)

    def configure(self, more: str = "") -> None:
        self.deployment.settings.write_text(
            f"[synapse]\nengine = {self.engine}\ncache_dirs = {self.hub.root}\n{more}\n"
        )

    def main(self, change: Callable[[str], str]) -> None:
        path = self.deployment.main_config
        path.write_text(change(path.read_text()))

    def block(self, more: str = "", host: str = "127.0.0.1", variables: str = "") -> Path:
        model = self.hub.add("acme/a", {"a.gguf": write_model(self.folder / "a.gguf")})["a.gguf"]
        path = self.deployment.block("a")
        path.write_text(
            BLOCK.format(
                launcher="/bin/true", engine=self.engine, model=model, host=host, more=more,
                variables=variables,
            )
        )  # fmt: skip
        path.chmod(0o600)
        return path

    def examined(self) -> Examination:
        return doctor.examine(self.deployment)

    def found(self) -> dict[str, Finding]:
        """By id, the worst first where there are several."""
        named: dict[str, Finding] = {}
        for finding in self.examined().findings:
            named.setdefault(finding.id, finding)
        return named


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> Iterator[Patient]:
    mask = os.umask(0o077)
    with tempfile.TemporaryDirectory(prefix="syn", dir="/tmp") as folder:
        monkeypatch.setenv("HOME", folder)
        yield Patient(Path(folder))
    os.umask(mask)


def _is_of_the_checkout(patient: Patient, finding: Finding) -> bool:
    """Somebody else may own it, where a suite runs in a container."""
    return finding.id == "permission-foreign" and str(patient.folder) not in finding.subject


HARMLESS = {"ok", "supervisord-down", "gateway-absent", "servers-of-others"}


def test_what_is_well_gets_no_more_than_notes(patient: Patient) -> None:
    patient.block()
    examination = patient.examined()
    own = [one for one in examination.findings if not _is_of_the_checkout(patient, one)]
    assert {finding.id for finding in own} - {"block-edited"} <= HARMLESS
    assert dict(examination.versions)["engine"] == "1"


def test_a_machine_without_a_deployment_is_looked_at_too(patient: Patient) -> None:
    examination = doctor.examine(Deployment(patient.folder / "none"))
    assert "not-laid-down" in {finding.id for finding in examination.findings}


# --- one thing is wrong --------------------------------------------------------------------------


def _without(section: str) -> Callable[[Patient], object]:
    return lambda patient: patient.main(lambda text: text.replace(f"[{section}]", f"[x-{section}]"))


def _with_web_server(*lines: str) -> Callable[[Patient], object]:
    said = "\n".join(("", "[inet_http_server]", *lines, ""))
    return lambda patient: patient.main(lambda text: text + said)


def _damaged(patient: Patient) -> None:
    patient.hub.add("acme/damaged-gguf", {"d.gguf": b"GGUF" + bytes(20)})


def _twice(patient: Patient) -> None:
    model = write_model(patient.folder / "t.gguf").read_bytes()
    patient.hub.add("acme/one", {"t.gguf": model})
    patient.hub.add("acme/two", {"t.gguf": model})


def _key_file(mode: int) -> Callable[[Patient], object]:
    def make(patient: Patient) -> None:
        path = patient.folder / "keys"
        path.write_text("s3cret\n")
        path.chmod(mode)
        patient.block(f"--api-key-file {path}")

    return make


ILLS: list[tuple[str, Callable[[Patient], object], str, Severity]] = [
    ("a setting is wrong", lambda p: p.configure("foo = 1"), "settings-invalid", Severity.ERROR),
    ("no rpcinterface", _without("rpcinterface:synapse"), "section-missing", Severity.ERROR),
    ("no eventlistener", _without("eventlistener:synapse"), "section-missing", Severity.ERROR),
    ("no ctlplugin", _without("ctlplugin:synapse"), "section-missing", Severity.WARNING),
    ("no include", _without("include"), "section-missing", Severity.ERROR),
    ("another include",
     lambda p: p.main(lambda text: text.replace("files=conf.d/*.conf", "files=x.d/*.conf")),
     "blocks-not-included", Severity.ERROR),
    ("garbage in conf.d", lambda p: p.deployment.block("z").write_text("garbage\n"),
     "config-broken", Severity.ERROR),
    ("a block that lost its model", lambda p: (p.block(), p.hub.root.rename(p.folder / "h")),
     "block-model-missing", Severity.WARNING),
    ("a rejected block", lambda p: p.deployment.rejected("a").write_text("x"),
     "block-rejected-beside", Severity.WARNING),
    ("a block of discovery beside an edited one",
     lambda p: p.deployment.block("a").with_suffix(".conf.new").write_text("x"),
     "block-new-beside", Severity.NOTE),
    ("a torn state", lambda p: p.deployment.intent.write_text("{"), "state-torn", Severity.WARNING),
    ("a state that was set aside", lambda p: (p.deployment.lib / "x.json.corrupt").write_text("{"),
     "state-set-aside", Severity.NOTE),
    ("no engine", lambda p: p.engine.unlink(), "engine-missing", Severity.ERROR),
    ("an old engine", lambda p: p.write_engine(flags=FLAGS - {"--slots"}),
     "engine-old", Severity.NOTE),
    ("an NVIDIA device without its reader",
     lambda p: p.write_engine(devices="  CUDA0: NVIDIA H100 (81079 MiB, 80000 MiB free)"),
     "device-reader-missing", Severity.WARNING),
    ("a full device", lambda p: p.write_engine(devices="  Vulkan0: Some (8000 MiB, 5 MiB free)"),
     "device-full", Severity.WARNING),
    ("no cache", lambda p: p.hub.root.rmdir(), "cache-missing", Severity.WARNING),
    ("an unfinished download", lambda p: p.hub.add_incomplete("acme/a-gguf", "x.gguf"),
     "download-unfinished", Severity.WARNING),
    ("a broken link", lambda p: p.hub.add_dangling("acme/a", "x.gguf"),
     "link-broken", Severity.WARNING),
    ("a damaged header", _damaged, "model-unusable", Severity.WARNING),
    ("a model that is there twice", _twice, "cache-duplicate", Severity.NOTE),
    ("no port is left", lambda p: (p.block(), p.configure("port_range = 18100-18100")),
     "ports-exhausted", Severity.ERROR),
    ("open to the network", lambda p: p.block(host="0.0.0.0"), "host-open", Severity.WARNING),  # noqa: S104
    ("a web server without a password", _with_web_server("port=127.0.0.1:9001"),
     "web-no-password", Severity.ERROR),
    ("a web server for everybody",
     _with_web_server("port=*:9001", "username=u", "password=p"),
     "web-not-loopback", Severity.WARNING),
    ("a web server at all",
     _with_web_server("port=127.0.0.1:9001", "username=u", "password=p"),
     "web-cross-site", Severity.NOTE),
    ("a folder for all", lambda p: p.deployment.blocks.chmod(0o777),
     "permission-writable", Severity.ERROR),
    ("a block for the group", lambda p: p.block().chmod(0o620),
     "permission-writable", Severity.ERROR),
    ("a folder above for all", lambda p: p.folder.chmod(0o707),
     "permission-writable", Severity.ERROR),
    ("an engine for all", lambda p: p.engine.chmod(0o777), "engine-missing", Severity.ERROR),
    ("a socket for all",
     lambda p: p.main(lambda text: text.replace("chmod=0700", "chmod=0777")),
     "socket-open", Severity.ERROR),
    ("a key in a command", lambda p: p.block("--api-key s3cret"), "key-in-command", Severity.ERROR),
    ("a token in the environment", lambda p: p.block(variables=',HF_TOKEN="s3cret"'),
     "key-in-environment", Severity.WARNING),
    ("a key file for all", _key_file(0o644), "key-file-open", Severity.ERROR),
    ("no key file", lambda p: p.block("--api-key-file nowhere"),
     "key-file-missing", Severity.ERROR),
    ("a stale socket", lambda p: _leave_socket(p.deployment.socket),
     "socket-stale", Severity.NOTE),
    ("a stale pid file", lambda p: p.deployment.pidfile.write_text("1\n"),
     "pidfile-stale", Severity.NOTE),
]  # fmt: skip


def _leave_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    path.chmod(0o700)


@pytest.mark.parametrize(
    ("make_ill", "name", "severity"), [row[1:] for row in ILLS], ids=[row[0] for row in ILLS]
)
def test_what_is_wrong_is_found(
    make_ill: Callable[[Patient], object], name: str, severity: Severity, patient: Patient
) -> None:
    """By its stable id, as bad as it is, with how to mend it; and nothing dies of it."""
    make_ill(patient)
    found = patient.found()
    assert found[name].severity is severity
    assert found[name].mend
    assert not {"check-failed", "check-late"} & set(found)


def test_missing_sections_come_with_the_lines_to_add(patient: Patient) -> None:
    """As `synapse init` would write them: with them all is well again."""
    _without("rpcinterface:synapse")(patient)
    lines = patient.found()["section-missing"].lines
    assert lines[0] == "[rpcinterface:synapse]"
    patient.main(lambda text: text + "\n" + "\n".join(lines) + "\n")
    assert "section-missing" not in patient.found()


def test_all_mistakes_in_the_settings_are_told_at_once(patient: Patient) -> None:
    patient.configure("foo = 1\nmax_parallel = many")
    found = [one for one in patient.examined().findings if one.id == "settings-invalid"]
    assert len(found) == 2


@pytest.mark.parametrize(
    ("host", "near"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False),  # noqa: S104
     ("192.168.1.5", False), ("*", False), ("", False), ("example.com", False)],
)  # fmt: skip
def test_loopback_is_what_only_this_machine_reaches(host: str, near: bool) -> None:
    assert network.is_loopback(host) is near


@pytest.mark.parametrize(
    ("end", "told"),
    [
        ("kill -ILL $$", "ends by SIGILL with any model: it was built for a newer processor"),
        ("kill -SEGV $$", "ends by SIGSEGV with any model"),
        ("exit 1", None),
        ("echo listening on http://127.0.0.1:9; exec sleep 60", None),
    ],
)
def test_an_engine_that_no_model_survives_is_found(
    end: str, told: str | None, patient: Patient
) -> None:
    """It says its version and lists its devices as any other."""
    said = patient.engine.read_text()
    patient.engine.write_text(said.replace("esac", f"esac\ncase $1 in --model) {end};; esac"))
    found = patient.found().get("engine-unfit")
    assert (found and found.message[: len(told or "")]) == told
    assert found is None or found.severity is Severity.ERROR


def test_each_finding_is_documented(patient: Patient) -> None:
    """docs/doctor.md knows every id, and no other."""
    sources = (CHECKOUT / "supervisor_synapse" / "doctor").glob("*.py")
    constants = {
        node.value
        for path in sources
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    ids = {text for text in constants if re.fullmatch(r"[a-z]+(-[a-z]+)+", text)}
    documented = re.findall(
        r"^\| `([a-z]+-[a-z-]+)` \|", (CHECKOUT / "docs/doctor.md").read_text(), re.M
    )
    assert len(documented) == len(set(documented)) > 60
    assert set(documented) == ids - {"llama-server"}


# --- what supervisord says -----------------------------------------------------------------------


def answers(
    *, state: ProcessState = ProcessState.RUNNING, age_seconds: float = 1.0, version: str = VERSION
) -> dict[str, object]:
    """Those of a supervisord that is well, but for what is given."""
    snapshot = Snapshot(0.0, (row(),), (), ListenerRow(1, version, 0.0, 0.0, 0.0))
    told = json.loads(snapshots.dump(snapshot)) | {"age_seconds": age_seconds}
    return {
        "supervisor.getSupervisorVersion": "4.3.0", "supervisor.getPID": 1,
        "supervisor.getAllProcessInfo": [process_info("synapse", state)],
        "supervisor.getAllConfigInfo": [], "synapse.getAPIVersion": "1.3",
        "synapse.models": json.dumps(told),
    }  # fmt: skip


def without(*names: str) -> dict[str, object]:
    return {name: value for name, value in answers().items() if name not in names}


@pytest.mark.parametrize(
    ("said", "name", "severity"),
    [
        (answers(), None, None),
        (without("synapse.getAPIVersion"), "plugin-missing", Severity.ERROR),
        (answers() | {"supervisor.getAllProcessInfo": []}, "listener-missing", Severity.ERROR),
        (answers(state=ProcessState.FATAL), "listener-down", Severity.ERROR),
        (answers() | {"synapse.models": ""}, "listener-silent", Severity.WARNING),
        (answers(age_seconds=60.0), "listener-silent", Severity.ERROR),
        (answers(version="0.0.1"), "version-differs", Severity.WARNING),
        (without("supervisor.getPID"), "supervisord-silent", Severity.ERROR),
    ],
)  # fmt: skip
def test_a_supervisord_that_is_not_well_is_told_of(
    said: dict[str, object], name: str | None, severity: Severity | None, patient: Patient
) -> None:
    with answering(patient.deployment.socket, said):
        found = patient.found()
    ills = {"plugin-", "listener-", "version-", "supervisord-"}
    named = [one for one in found if one.startswith(tuple(ills))]
    assert named == ([] if name is None else [name])
    assert name is None or found[name].severity is severity


@pytest.mark.parametrize(
    ("phase", "severity"), [(Phase.FAILED, Severity.ERROR), (Phase.BACKOFF, Severity.WARNING)]
)
@pytest.mark.parametrize("kind", list(FailureClass))
def test_a_model_that_failed_is_named_with_its_evidence(
    phase: Phase, severity: Severity, kind: FailureClass, patient: Patient
) -> None:
    failure = Failure(kind, "error: so it was", 1.0)
    failed = row(name="a", phase=phase, reason="was given up", last_failure=failure)
    snapshot = Snapshot(0.0, (row(), failed), (), ListenerRow(1, VERSION, 0.0, 0.0, 0.0))
    told = json.loads(snapshots.dump(snapshot)) | {"age_seconds": 1.0}
    said = answers() | {"synapse.models": json.dumps(told)}
    with answering(patient.deployment.socket, said):
        found = [one for one in patient.examined().findings if one.id == "model-failed"]
    assert [(one.subject, one.severity) for one in found] == [("a", severity)]
    assert found[0].message == "was given up: error: so it was"
    assert found[0].mend


@contextlib.contextmanager
def supervisord_process(patient: Patient) -> Iterator[None]:
    """A process that looks like a supervisord on this deployment."""
    program = patient.folder / "supervisord"
    if not program.exists():
        program.symlink_to(sys.executable)
    sleep = "import time; print('up', flush=True); time.sleep(60)"
    command = [str(program), "-c", sleep, str(patient.deployment.main_config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        started.stdout.readline()
        try:
            yield
        finally:
            started.kill()


def test_a_supervisord_without_its_socket_and_a_second_one_are_found(patient: Patient) -> None:
    with supervisord_process(patient):
        found = patient.found()
        assert "supervisord-unreachable" in found
        assert "supervisord-twice" not in found
        with supervisord_process(patient):
            assert "supervisord-twice" in patient.found()


# --- whatever happens ----------------------------------------------------------------------------


def test_a_check_that_crashes_is_a_finding_and_the_others_go_on(patient: Patient) -> None:
    def crash(case: Case) -> Iterator[Finding]:
        yield note("before", "x", "was found before")
        raise RuntimeError("boom\x1b[31m")

    checks = (Check("bad", crash), Check("good", lambda case: [fine("x", "well")]))
    bad, good = doctor.examine(patient.deployment, checks=checks).checks
    assert [one.id for one in bad.findings] == ["before", "check-failed"]
    assert bad.findings[1].message == "this check failed: RuntimeError: boom\\x1b[31m"
    assert good.severity is Severity.OK


def test_a_check_that_hangs_is_left_behind(patient: Patient) -> None:
    ended = threading.Event()

    def hang(case: Case) -> list[Finding]:
        ended.wait(60)
        return []

    checks = (Check("slow", hang), Check("good", lambda case: [fine("x", "well")]))
    slow, good = doctor.examine(patient.deployment, checks=checks, seconds=0.2).checks
    ended.set()
    assert [one.id for one in slow.findings] == ["check-late"]
    assert good.severity is Severity.OK


def test_nothing_is_changed(patient: Patient) -> None:
    """Not even a torn file is set aside, nor a header remembered."""
    patient.block()
    for path in (patient.deployment.registry, patient.deployment.headers):
        path.write_text("{")
    (patient.deployment.blocks / "a.conf.new").write_text("x")

    def state() -> dict[str, tuple[int, bytes]]:
        files = [path for path in patient.folder.rglob("*") if path.is_file()]
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = state()
    doctor.examine(patient.deployment, deep=lambda done, total: None)
    assert state() == before


def test_no_secret_is_shown(patient: Patient) -> None:
    """Neither in text nor in JSON, with all that is well either."""
    patient.block("--api-key s3cret", variables=',HF_TOKEN="s3cret",X="hf_s3crets3crets3cret"')
    _with_web_server("port=127.0.0.1:9001", "username=u", "password=s3cret")(patient)
    examination = patient.examined()
    shown = report.examination_text(examination, verbose=True)
    assert "key-in-command" in {finding.id for finding in examination.findings}
    assert "s3cret" not in shown + json.dumps(report.examination_json(examination))


def test_names_from_outside_cannot_steer_a_terminal(patient: Patient) -> None:
    """All is one line of printable ASCII for each part."""
    patient.hub.add_dangling("acme/a", "x\x1b[2J\nERROR \N{SNOWMAN}.gguf")
    shown = report.examination_text(patient.examined(), verbose=True)
    assert shown.isascii()
    assert all(line.isprintable() for line in shown.split("\n"))


# --- deep ----------------------------------------------------------------------------------------


def deep(patient: Patient) -> list[Finding]:
    """What the checksums say, the last check."""
    read: list[tuple[int, int]] = []
    examination = doctor.examine(
        patient.deployment, deep=lambda done, total: read.append((done, total))
    )
    assert [done for done, _ in read] == sorted(done for done, _ in read)
    assert all(done <= total for done, total in read)
    return [one for one in examination.checks[-1].findings if one.severity > Severity.OK]


def test_content_that_changed_at_the_same_size_is_found(patient: Patient) -> None:
    """By the name of the model's file, with how to have it again."""
    path = patient.hub.add("acme/a", {"a-Q4_0.gguf": b"GGUF" * 1000})["a-Q4_0.gguf"].resolve()
    patient.hub.add("acme/b", {"b.gguf": b"GGUF" * 2000})
    assert deep(patient) == []
    path.write_bytes(b"GGUF" * 999 + b"GGUf")
    (damaged,) = deep(patient)
    assert (damaged.id, damaged.subject) == ("blob-damaged", "acme/a/a-Q4_0.gguf")
    assert f"rm {path}" in damaged.mend
    assert "synapse pull acme/a:a-Q4_0" in damaged.mend


def test_small_files_are_compared_by_the_hash_of_git(patient: Patient) -> None:
    """What is named by neither hash is left alone."""
    git = "ce013625030ba8dba906f756967f9e9ca394464a"
    patient.hub.add("acme/a", {"good.md": b"hello\n"}, sha=git)
    patient.hub.add("acme/b", {"bad.md": b"hellp\n"}, sha=git)
    patient.hub.add("acme/c", {"other.md": b"x"}, sha="W-etag")
    assert [one.subject for one in deep(patient)] == ["acme/b/bad.md"]


# --- how it is shown -----------------------------------------------------------------------------


def test_the_worst_stands_first_and_what_is_well_is_a_count(patient: Patient) -> None:
    patient.configure("foo = 1")
    patient.deployment.rejected("a").write_text("x")
    examination = patient.examined()
    lines = report.examination_text(examination).splitlines()
    assert lines[0].startswith("ERROR    /tmp/")
    assert any(line.startswith("         mend: ") for line in lines)
    assert not any(line.startswith("OK") for line in lines)
    assert lines[-1].startswith("1 error, 1 warning, ")
    assert not examination.is_well
    verbose = report.examination_text(examination, verbose=True)
    assert sum(line.startswith("OK ") for line in verbose.splitlines()) > 10
    assert "supervisor_synapse 0." in verbose


def test_as_json_each_finding_has_its_id_and_its_check(patient: Patient) -> None:
    patient.configure("foo = 1")
    value = json.loads(json.dumps(report.examination_json(patient.examined())))
    assert value["ok"] is False
    first = value["findings"][0]
    assert first["id"] == "settings-invalid"
    assert first["severity"] == "error"
    assert first["check"] == "settings"
    assert {check["name"] for check in value["checks"]} == {check.name for check in doctor.CHECKS}
    assert value["versions"]["supervisor"]


# --- the gateway ---------------------------------------------------------------------------------


def haproxy_that_says(folder: Path, said: str) -> Path:
    """A program of that name, to stand first on PATH."""
    program = folder / "bin" / "haproxy"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho '{said}'\n")
    program.chmod(0o700)
    return program.parent


@pytest.mark.parametrize(
    ("said", "settings", "name", "severity"),
    [
        ("HAProxy version 2.6.12 +LUA +PROMEX", "", None, None),
        ("HAProxy version 2.4.0 +LUA +PROMEX", "", "gateway-unusable", Severity.WARNING),
        ("HAProxy version 2.8.3 -LUA +PROMEX", "enabled = true", "gateway-unusable",
         Severity.ERROR),
        ("HAProxy version 2.8.3 -LUA", "enabled = false", None, None),
        ("HAProxy version 2.8.3 +LUA +PROMEX", "bind = 0.0.0.0:8080", "gateway-open",
         Severity.WARNING),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_gateway_is_told(
    said: str, settings: str, name: str | None, severity: Severity | None,
    patient: Patient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    folder = haproxy_that_says(tmp_path, said)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    patient.configure(f"[gateway]\n{settings}")
    found = patient.found()
    told = {one: found[one].severity for one in found if one.startswith("gateway-")}
    assert told == ({name: severity} if name else {})


def test_the_gateways_own_block_is_not_taken_for_a_models(patient: Patient) -> None:
    """It runs by the same launcher, and HAProxy is no engine to be replaced."""
    patient.block()
    before = set(patient.found())
    gateway = patient.deployment.block("gateway")
    gateway.write_text(
        "[program:gateway]\ncommand=/bin/true --record r -- /bin/sh -W -f haproxy.cfg\n"
    )
    gateway.chmod(0o600)
    assert set(patient.found()) == before
