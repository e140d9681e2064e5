"""Changes by hand and by settings: what cannot work is undone, and only what changed is touched.

Against real supervisord and real llama-server. Three tiny models that have proved themselves; each
test breaks one of them in another way, and what served before has to serve again, while the others
keep their processes.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from supervisor_synapse.adapters import deployment as deployments
from supervisor_synapse.adapters import generations
from tests.conftest import Engine
from tests.gguf_factory import write_model
from tests.integration.harness import (
    BIN,
    Deployment,
    chat,
    deployed,
    holds_for,
    promised,
    stranger_on,
    wait_until,
)
from tests.ports import port_is_free

pytestmark = pytest.mark.usefixtures("llama_server")

NAMES = ("alpha", "beta", "gamma")
BACK_SECONDS = 15.0
TRIAL_SECONDS = 2
SETTINGS = f"""
memory_reserve = 0
trial_seconds = {TRIAL_SECONDS}
[probe]
period_seconds = 0.5
[stop]
drain_seconds = 2
term_seconds = 1
[restart]
backoff_initial_seconds = 0.5
intensity = 5
period_seconds = 60
cooldown_seconds = 60
"""


@contextlib.contextmanager
def proved(*names: str, settings: str = SETTINGS) -> Iterator[Deployment]:
    """A deployment whose models have all proved themselves."""
    with deployed(settings) as at:
        at.add(*names)
        at.synapse("up", "--detach")
        wait_until(lambda: _are_proved(at, names), 30, "proved")
        yield at


def _are_proved(at: Deployment, names: tuple[str, ...]) -> bool:
    rows = at.rows()
    return all(
        name in rows and rows[name]["phase"] == "ready" and not rows[name]["trial"]
        for name in names
    )


@pytest.fixture(scope="module")
def fleet(llama_server: Engine) -> Iterator[Deployment]:
    with proved(*NAMES) as deployment:
        yield deployment


@pytest.fixture
def at(fleet: Deployment) -> Deployment:
    """The fleet of this module as it was in the beginning, whatever a test before has left."""
    for path in (*fleet.conf_d.iterdir(), *(fleet.etc / "templates").iterdir()):
        if path.name not in {f"{name}.conf" for name in NAMES}:
            path.unlink()
    fleet.configure(SETTINGS)
    forced = [word for name in NAMES for word in ("--force", name)]
    wait_until(lambda: fleet.synapse("discover", *forced, expect=None).status == 0, 30, "reset")
    fleet.ctl("update")
    wait_until(lambda: _are_proved(fleet, NAMES), 30, "proved")
    return fleet


@pytest.fixture
def own(llama_server: Engine) -> Iterator[Deployment]:
    """A deployment of a test's own."""
    with proved(*NAMES) as deployment:
        yield deployment


_flags = itertools.count(1)


@pytest.fixture
def flag() -> str:
    """An argument that llama-server does not know, and that was never tried."""
    return f"--no-such-flag-{next(_flags)}"


def block(at: Deployment, name: str) -> Path:
    return at.conf_d / f"{name}.conf"


def rejected(at: Deployment, name: str) -> Path:
    return at.conf_d / f"{name}.conf.rejected"


def with_argument(text: str, words: str) -> str:
    """A block whose server gets one more argument."""
    return re.sub(r"^(command=.*)$", rf"\1 {words}", text, flags=re.MULTILINE)


def edit(at: Deployment, name: str, words: str) -> str:
    """Add an argument to a block, as a user would who edits it; the new text."""
    text = with_argument(block(at, name).read_text(), words)
    block(at, name).write_text(text)
    return text


def arguments(at: Deployment, name: str) -> list[str]:
    """What the running server of a model was given; [] while none runs."""
    server = at.servers().get(name)
    words: list[str] = []
    with contextlib.suppress(psutil.Error):
        words = server.cmdline() if server is not None else []
    return words


class Former:
    """How everything was before a change."""

    def __init__(self, at: Deployment, changed: str) -> None:
        self.at, self.changed = at, changed
        self.pids = at.pids()
        self.text = block(at, changed).read_text()
        self.arguments = arguments(at, changed)
        self.began = time.time()

    def serves_again(self, *, within: float = BACK_SECONDS, same_port: bool = True) -> Any:
        """The model as listed, once its former block serves; nobody else was touched."""

        def back() -> Any:
            row = self.at.rows().get(self.changed, {})
            is_back = row.get("phase") == "ready" and block(self.at, self.changed).exists()
            if not is_back or self._now() != self._then(same_port):
                return None
            told = row["last_failure"] is not None and row["last_failure"]["at"] >= self.began - 1
            return row if told else None

        left = max(self.began + promised(within) - time.time(), 0)
        row = wait_until(back, left, f"{self.changed} back: {self.at.rows().get(self.changed)}")
        assert chat(row)
        after = self.at.pids()
        assert {name for name in self.pids if after[name] != self.pids[name]} <= {self.changed}
        return row

    def _now(self) -> tuple[str, list[str]]:
        server = self.at.servers().get(self.changed)
        with contextlib.suppress(Exception):
            return block(self.at, self.changed).read_text(), server.cmdline() if server else []
        return "", []

    def _then(self, same_port: bool) -> tuple[str, list[str]]:
        assert same_port
        return self.text, self.arguments


def test_a_bad_flag_in_the_settings_is_refused_before_anything_is_stopped(
    at: Deployment, flag: str
) -> None:
    """The engine itself says that it does not know it; the model goes on with its process."""
    former = Former(at, "beta")
    at.configure(f"{SETTINGS}\n[model:beta]\nargs = {flag}")
    done = at.synapse("discover", expect=1)
    assert "beta" in done.text
    assert flag in done.text
    row = former.serves_again()
    assert at.pids() == former.pids
    assert row["last_failure"]["class"] == "bad-argument"
    assert flag in row["last_failure"]["message"]
    assert flag in row["reason"]
    text = rejected(at, "beta").read_text()
    assert text.startswith("; Rejected at ")
    assert flag in text.split("[program:")[0]
    assert any(
        step["class"] == "bad-argument" and flag in step["evidence"]
        for step in at.steps("beta", former.began)
    )


def test_what_was_refused_is_not_tried_again_until_it_is_another(at: Deployment, flag: str) -> None:
    """Discovering again changes nothing; other settings are taken."""
    at.configure(f"{SETTINGS}\n[model:beta]\nargs = {flag}")
    at.synapse("discover", expect=1)
    before, pids = at.blocks(), at.pids()
    at.synapse("discover", expect=1)
    assert at.blocks() == before
    assert at.pids() == pids
    assert "rejected" in at.rows()["beta"]["reason"]
    at.configure(SETTINGS)
    at.synapse("discover")
    wait_until(lambda: "rejected" not in at.rows()["beta"]["reason"], 10, "no longer told")
    assert at.pids() == pids
    at.configure(f"{SETTINGS}\n[model:beta]\ncontext = 256")
    at.synapse("discover")
    row = at.wait_for_rows({"beta": "ready"})["beta"]
    assert row["context"] == 256
    assert row["trial"]
    assert "rejected" not in row["reason"]


def test_a_bad_flag_in_an_edited_block_goes_back_by_itself(at: Deployment, flag: str) -> None:
    """`supervisorctl update` stops the model; the edit fails, and the former block serves."""
    former = Former(at, "beta")
    bad = edit(at, "beta", flag)
    at.ctl("update")
    row = former.serves_again()
    assert row["last_failure"]["class"] == "bad-argument"
    assert bad in rejected(at, "beta").read_text()
    assert "goes back to generation" in str(at.steps("beta", former.began))
    assert not row["trial"]


def test_the_same_failed_edit_is_not_tried_a_second_time(at: Deployment, flag: str) -> None:
    former = Former(at, "beta")
    bad = edit(at, "beta", flag)
    at.ctl("update")
    former.serves_again()
    log = at.log_of("beta").count(flag)
    again = Former(at, "beta")
    block(at, "beta").write_text(bad)
    at.ctl("update")
    again.serves_again()
    assert at.log_of("beta").count(flag) == log


def test_an_edit_that_works_is_kept_and_proves_itself(at: Deployment, flag: str) -> None:
    """It comes back by itself after `update`, is a generation, and later what is gone back to."""
    former = Former(at, "beta")
    good = edit(at, "beta", "--temp 0.5")
    at.ctl("update")

    def runs() -> bool:
        server = at.servers().get("beta")
        return server is not None and "--temp" in server.cmdline()

    wait_until(runs, promised(BACK_SECONDS), "the edit runs")
    wait_until(lambda: _are_proved(at, ("beta",)), 20, "the edit has proved itself")
    row = at.rows()["beta"]
    listed = at.synapse("generations", "beta", "--json").json()
    assert listed[-1]["by"] == "update"
    assert listed[-1]["generation"] == row["generation"]
    assert listed[-1]["blocks"]["beta"]["state"] == "good"
    block(at, "beta").write_text(with_argument(good, flag))
    former = Former(at, "beta")
    former.text = good
    at.ctl("update")
    former.serves_again()
    assert "--temp" in arguments(at, "beta")


def test_a_context_that_cannot_fit_goes_back(at: Deployment) -> None:
    """By settings and by hand: the numbers are told, and the former context serves."""
    former = Former(at, "beta")
    block(at, "beta").write_text(re.sub(r"--ctx-size \d+", "--ctx-size 2000000000", former.text))
    at.ctl("update")
    row = former.serves_again()
    assert row["last_failure"]["class"] == "out-of-memory"
    assert "needs" in row["last_failure"]["message"]


def test_a_corrupt_new_file_goes_back_to_the_former_one(own: Deployment) -> None:
    """The repo has a new revision whose file cannot be loaded; the former blob serves on."""
    at = own
    former = Former(at, "beta")
    whole = write_model(at.sources / "beta2.gguf", seed=99)
    content = whole.read_bytes()
    whole.write_bytes(content[: len(content) * 2 // 3])
    at.hub.add("acme/beta", {"beta.gguf": whole})
    at.synapse("discover", expect=None)
    row = at.rows()["beta"]
    assert row["phase"] == "ready" or former.serves_again()
    wait_until(lambda: at.rows()["beta"]["phase"] == "ready", promised(BACK_SECONDS))
    assert arguments(at, "beta") == former.arguments
    after = at.pids()
    assert {name for name in former.pids if after[name] != former.pids[name]} <= {"beta"}


def test_a_broken_template_changes_nothing(at: Deployment) -> None:
    pids, blocks = at.pids(), at.blocks()
    template = at.etc / "templates" / "program.conf.j2"
    template.write_text("[program:{{ name }\n")
    template.chmod(0o600)
    done = at.synapse("discover", expect=2)
    assert "program.conf.j2" in done.err
    assert at.pids() == pids
    assert at.blocks() == blocks


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ("[program:beta\ncommand=/bin/true\n", "beta.conf"),
        ("PERCENT", "beta.conf"),
        ("stopsignal", "beta.conf"),
    ],
)
def test_a_syntax_error_in_a_block_is_set_aside_with_file_and_line(
    at: Deployment, broken: str, named: str
) -> None:
    """supervisord never reads it: neither `update` nor `reload` comes to harm."""
    former = Former(at, "beta")
    text = {
        "PERCENT": with_argument(former.text, "--override-kv 50%x"),
        "stopsignal": former.text.replace("stopsignal=TERM", "stopsignal=NOPE"),
    }.get(broken, broken)
    block(at, "beta").write_text(text)
    refused = at.ctl("reload", expect=None)
    assert refused.status != 0
    assert named in refused.text
    assert at.supervisord().is_running()
    wait_until(lambda: block(at, "beta").read_text() == former.text, promised(BACK_SECONDS))
    reason = rejected(at, "beta").read_text().split("[program:")[0]
    assert named in reason
    assert re.search(r"line \d+", reason), reason
    assert at.pids() == former.pids
    row = wait_until(lambda: _told(at, "beta", former.began), 10, "told")
    assert named in row["last_failure"]["message"]


def test_a_block_that_no_longer_names_its_program_is_set_aside(at: Deployment) -> None:
    """To supervisord it is a file like any other, and the model would be gone in silence."""
    former = Former(at, "beta")
    block(at, "beta").write_text(former.text.replace("[program:beta]", "[program/beta]"))
    at.ctl("update")
    wait_until(lambda: block(at, "beta").read_text() == former.text, promised(BACK_SECONDS))
    assert "[program:beta]" in rejected(at, "beta").read_text().split("\n")[1]
    former.serves_again()


def _told(at: Deployment, name: str, since: float) -> Any:
    row = at.rows()[name]
    failure = row["last_failure"]
    return row if failure is not None and failure["at"] >= since - 1 else None


def test_a_strangers_broken_block_is_named_and_left_alone(at: Deployment) -> None:
    pids = at.pids()
    strange = at.conf_d / "strange.conf"
    strange.write_text("[program:strange\ncommand=/bin/true\n")
    assert "strange.conf" in at.ctl("reload", expect=None).text
    log = at.log / "synapse.log"
    wait_until(lambda: "strange.conf" in log.read_text(), promised(BACK_SECONDS), "named")
    assert holds_for(strange.exists, 3)
    assert strange.read_text() == "[program:strange\ncommand=/bin/true\n"
    assert not (at.conf_d / "strange.conf.rejected").exists()
    assert at.pids() == pids


def test_a_strangers_program_is_never_touched(at: Deployment, flag: str) -> None:
    """It keeps its file and its process through discoveries, edits and rollbacks of models."""
    strange = at.conf_d / "strange.conf"
    text = "[program:strange]\ncommand=/bin/sleep 600\nautostart=true\n"
    strange.write_text(text)
    at.ctl("update")
    pid = at.ctl("pid", "strange").out
    former = Former(at, "beta")
    edit(at, "beta", flag)
    at.ctl("update")
    former.serves_again()
    at.configure(f"{SETTINGS}\n[model:alpha]\ncontext = 256")
    at.synapse("discover")
    assert strange.read_text() == text
    assert at.ctl("pid", "strange").out == pid


def test_a_deleted_file_under_a_running_server_costs_nothing_until_it_is_needed(
    at: Deployment,
) -> None:
    """A changed setting is not applied by stopping a model whose file is gone."""
    former = Former(at, "beta")
    path = Path(former.arguments[former.arguments.index("--model") + 1])
    moved = path.with_name("away")
    os.replace(path, moved)
    at.configure(f"{SETTINGS}\n[model:alpha]\ncontext = 256")
    block(at, "beta").write_text(with_argument(former.text, "--top-k 33"))
    at.ctl("update")
    row = at.wait_for_rows({"beta": "failed"}, promised(BACK_SECONDS))["beta"]
    assert row["last_failure"]["class"] == "model-missing"
    os.replace(moved, path)
    former.serves_again()


def test_a_port_stolen_between_plan_and_start_goes_back_to_the_former(at: Deployment) -> None:
    former = Former(at, "beta")
    port = at.ports[-1]
    assert port_is_free(port)
    block(at, "beta").write_text(re.sub(r"--port \d+", f"--port {port}", former.text))
    with stranger_on(port):
        at.ctl("update")
        row = former.serves_again()
    assert row["last_failure"]["class"] == "port-in-use"
    assert str(port) in row["last_failure"]["message"]


def test_a_generation_that_breaks_several_models_goes_back_as_a_whole(at: Deployment) -> None:
    """Also the model that would have worked has its former block again."""
    pids = {name: block(at, name).read_text() for name in NAMES}
    for name, words in (("alpha", "--bad-a"), ("beta", "--bad-b"), ("gamma", "--temp 0.5")):
        edit(at, name, words)
    at.ctl("update")

    def back() -> bool:
        rows = at.rows()
        texts = {name: block(at, name).read_text() for name in NAMES}
        return texts == pids and all(rows[name]["phase"] == "ready" for name in NAMES)

    wait_until(back, promised(2 * BACK_SECONDS), "all as before")
    wait_until(lambda: "--temp" not in arguments(at, "gamma"), promised(BACK_SECONDS))
    assert "broke" in at.rows()["gamma"]["last_failure"]["message"]


def test_several_changed_models_are_rolled_one_at_a_time(at: Deployment) -> None:
    """At each moment at most one of three healthy models is out."""
    at.configure(f"{SETTINGS}\n[model:*]\ncontext = 256")
    began = time.time()
    at.synapse("discover")
    wait_until(lambda: _are_proved(at, NAMES), 30, "all proved")
    assert {row["context"] for row in at.rows().values()} == {256}
    out: set[str] = set()
    for step in at.history():
        if step["when"] < began:
            continue
        if step["to"] == "ready":
            out.discard(step["model"])
        elif step["from"] == "ready":
            out.add(step["model"])
        assert len(out) <= 1, (out, step)


def test_a_model_without_a_former_block_fails_and_is_told(llama_server: Engine) -> None:
    """There is nothing to go back to: it is failed at once, with the reason; the others serve."""
    with deployed(f"{SETTINGS}\n[model:beta]\nargs = --no-such-flag") as at:
        at.add(*NAMES)
        at.synapse("up", "--detach", expect=1)
        rows = at.wait_for_rows({"alpha": "ready", "beta": "failed", "gamma": "ready"})
        assert "--no-such-flag" in rows["beta"]["last_failure"]["message"]
        assert not rejected(at, "beta").exists()


def test_rollback_by_command_goes_to_the_former_good_one_and_to_a_named_one(
    at: Deployment,
) -> None:
    former = Former(at, "beta")
    first = at.rows()["beta"]["generation"]
    for context in (256, 384):
        at.configure(f"{SETTINGS}\n[model:beta]\ncontext = {context}")
        at.synapse("discover")
        wait_until(lambda: _are_proved(at, ("beta",)), 20, "proved")
        assert at.rows()["beta"]["context"] == context
    said = at.synapse("rollback", "beta").out
    assert "beta" in said

    def has(context: int) -> bool:
        row = at.rows()["beta"]
        return bool(row["phase"] == "ready" and row["context"] == context)

    wait_until(lambda: has(256), promised(BACK_SECONDS), "the former one")
    at.ctl("rollback", "beta", str(first))
    wait_until(lambda: arguments(at, "beta") == former.arguments, promised(BACK_SECONDS))
    at.synapse("discover")
    assert arguments(at, "beta") == former.arguments
    assert at.synapse("rollback", "beta", "--to", "999", expect=None).status != 0
    assert at.synapse("rollback", "nobody", expect=None).status != 0
    assert {name: pid for name, pid in at.pids().items() if name != "beta"} == {
        name: pid for name, pid in former.pids.items() if name != "beta"
    }


def test_a_never_good_block_is_no_target(at: Deployment, flag: str) -> None:
    """Neither by itself nor by command."""
    former = Former(at, "beta")
    edit(at, "beta", flag)
    at.ctl("update")
    former.serves_again()
    listed = at.synapse("generations", "beta", "--json").json()
    bad = next(one for one in listed if one["blocks"]["beta"]["state"] == "rejected")
    done = at.synapse("rollback", "beta", "--to", str(bad["generation"]), expect=1)
    assert "never good" in done.err


def test_rollback_works_while_nothing_runs(own: Deployment) -> None:
    at = own
    former = Former(at, "beta")
    at.configure(f"{SETTINGS}\n[model:beta]\ncontext = 256")
    at.synapse("discover")
    wait_until(lambda: _are_proved(at, ("beta",)), 20, "proved")
    at.down()
    at.synapse("rollback", "beta")
    assert block(at, "beta").read_text() == former.text
    at.configure(SETTINGS)
    at.synapse("up", "--detach")
    assert arguments(at, "beta") == former.arguments


def test_nothing_changed_touches_nothing(own: Deployment) -> None:
    at = own
    at.synapse("discover")  # it has learned what they take
    listeners_own = {"state.json", "memory.json"}
    before = {
        path: path.stat().st_mtime_ns
        for path in (*at.etc.rglob("*"), *at.lib.rglob("*"))
        if path.is_file() and path.name not in listeners_own
    }
    pids = at.pids()
    at.synapse("discover")
    after = {path: path.stat().st_mtime_ns for path in before}
    assert after == before
    assert at.pids() == pids
    known = generations.every(deployments.Deployment(at.prefix))
    assert len(known) == 1


def test_a_removed_model_is_drained_and_its_block_kept_in_the_generation(own: Deployment) -> None:
    at = own
    text = block(at, "beta").read_text()
    shutil.rmtree(at.hub.repo("acme/beta"))
    assert at.discover()["changes"]["removed"] == ["beta"]
    wait_until(lambda: "beta" not in at.rows(), promised(BACK_SECONDS), "gone")
    assert not block(at, "beta").exists()
    assert at.stop_lines("beta")
    of = deployments.Deployment(at.prefix)
    first = generations.every(of)[0]
    kept = generations.kept(of, first.blocks["beta"])
    assert kept is not None
    assert kept.text == text


def test_a_second_discovery_says_that_the_first_is_running(at: Deployment) -> None:
    at.configure(f"{SETTINGS}\n[model:*]\ncontext = 256")
    first = subprocess.Popen(
        at.command("discover"), env=at.environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        lock = at.prefix / "var" / "run" / "discover.lock"
        wait_until(lambda: _is_locked(lock) or first.poll() is not None, 30, "at work")
        second = at.synapse("discover", expect=None)
        assert second.status == 0 or "another discovery" in second.err
        assert first.wait(60) == 0
    finally:
        first.kill()
        first.communicate()
    wait_until(lambda: _are_proved(at, NAMES), 30, "proved")


def _is_locked(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), path.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.mark.timeout(300)
def test_whoever_is_killed_in_the_middle_of_a_change_is_carried_on_with(own: Deployment) -> None:
    """Discoveries and listeners killed at random moments: each time one of the two blocks serves,
    whole, once, and all state can be read.
    """
    at = own
    rounds = int(os.environ.get("SYNAPSE_KILLS", "8"))
    chance = random.Random(7)
    for turn in range(rounds):
        kind = chance.choice(("discover", "listener", "edit", "rollback"))
        context = 256 if turn % 2 else 384
        if kind == "edit":
            edit(at, "beta", f"--no-such-{turn}")
            at.ctl("update", expect=None)
            _kill(at.listener(), chance.uniform(0, 1.5))
        elif kind == "rollback":
            asked = subprocess.Popen(
                at.command("rollback", "beta"), env=at.environment(), stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            _kill(at.listener(), chance.uniform(0, 1.0))
            asked.wait(60)
        else:
            at.configure(f"{SETTINGS}\n[model:beta]\ncontext = {context}")
            running = subprocess.Popen(
                at.command("discover"), env=at.environment(), stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            time.sleep(chance.uniform(0, 1.2))
            if kind == "discover":
                running.kill()
            else:
                _kill(at.listener(), 0)
            running.wait(60)
        _converges(at)


def _kill(process: Any, after_seconds: float) -> None:
    time.sleep(after_seconds)
    if process is not None:
        with contextlib.suppress(Exception):
            process.send_signal(signal.SIGKILL)


def _converges(at: Deployment) -> None:
    """Within the time promised: all ready, one server each, each with what its block says."""

    def settled() -> bool:
        rows = at.rows()
        if not all(rows.get(name, {}).get("phase") == "ready" for name in NAMES):
            return False
        servers = at.all_servers()
        if sorted(alias for alias, _ in servers) != sorted(NAMES):
            return False
        words = {name: " ".join(process.cmdline()) for name, process in servers}
        return all(words[name] in block(at, name).read_text().replace("'", "") for name in NAMES)

    wait_until(settled, promised(BACK_SECONDS), f"{at.rows()}")
    for path in at.lib.rglob("*.json"):
        json.loads(path.read_text())
    assert not list(at.lib.rglob("*.corrupt"))


def test_the_dry_run_shows_what_would_change_and_what_would_restart(at: Deployment) -> None:
    blocks, pids = at.blocks(), at.pids()
    at.configure(f"{SETTINGS}\n[model:beta]\ncontext = 256")
    said = at.synapse("discover", "--dry-run").out
    assert "~ beta" in said
    assert "--ctx-size" in said
    assert "256" in said
    assert "restart" in said
    assert "alpha" not in said
    assert (at.blocks(), at.pids()) == (blocks, pids)


def test_supervisorctl_discovers_and_shows_what_it_found(at: Deployment) -> None:
    at.configure(f"{SETTINGS}\n[model:beta]\ncontext = 256")
    done = at.ctl("discover")
    assert "beta" in done.out
    assert at.wait_for_rows({"beta": "ready"})["beta"]["context"] == 256
    listed = at.synapse("generations", "--json").json()
    assert "beta" in listed[-1]["changed"]


def test_generations_are_shown_as_a_table(own: Deployment) -> None:
    at = own
    table = at.synapse("generations").out
    assert "GENERATION" in table
    assert "+ alpha" in table
    assert "good, applied" in table
    assert at.run(str(BIN / "synapse"), "--prefix", str(at.prefix), "generations", "x", expect=2)


def test_a_corrupt_new_quantization_leaves_the_former_one_serving(llama_server: Engine) -> None:
    """The settings prefer a file of the same repo that cannot be loaded: who served, serves on."""
    with deployed(SETTINGS) as at:
        small = write_model(at.sources / "m-Q4_K_M.gguf", seed=1)
        at.hub.add("acme/m", {"m-Q4_K_M.gguf": small})
        at.add("other")
        at.synapse("up", "--detach")
        wait_until(lambda: _are_proved(at, ("m-q4_k_m", "other")), 30, "proved")
        pids = at.pids()
        content = write_model(at.sources / "m-Q8_0.gguf", seed=2).read_bytes()
        corrupt = at.sources / "corrupt.gguf"
        corrupt.write_bytes(_with_an_unknown_tensor(content))
        at.hub.add("acme/m", {"m-Q8_0.gguf": corrupt, "m-Q4_K_M.gguf": small})
        at.configure(
            f"{SETTINGS}\n[model:m-q8_0]\nenabled = true\n[model:m-q4_k_m]\nenabled = false"
        )
        at.synapse("discover", expect=None)
        rows = at.wait_for_rows({"m-q4_k_m": "ready", "m-q8_0": "failed"}, promised(BACK_SECONDS))
        assert chat(rows["m-q4_k_m"])
        assert at.pids().items() >= pids.items()
        assert rows["m-q8_0"]["last_failure"]["class"] in ("model-corrupt", "crashed")


def _with_an_unknown_tensor(content: bytes) -> bytes:
    """A model's file whose header is fine for a reader and wrong for the engine: the name of the
    first tensor of a layer is another one.
    """
    assert b"blk.0.attn_norm.weight" in content
    return content.replace(b"blk.0.attn_norm.weight", b"blk.0.attn_nurm.weight", 1)


def test_a_port_that_a_stranger_has_is_refused_before_anything_is_stopped(at: Deployment) -> None:
    former = Former(at, "beta")
    port = at.ports[-1]
    at.configure(f"{SETTINGS}\n[model:beta]\nport = {port}")
    with stranger_on(port):
        done = at.synapse("discover", expect=None)
    assert str(port) in done.text
    assert at.pids() == former.pids
    assert block(at, "beta").read_text() == former.text
    assert at.rows()["beta"]["phase"] == "ready"


def test_a_port_given_to_two_models_removes_neither(at: Deployment) -> None:
    """Whom the plan has no place for goes on as it was, and the warning says why."""
    pids = at.pids()
    port = at.rows()["beta"]["port"]
    at.configure(f"{SETTINGS}\n[model:beta]\nport = {port}\n[model:gamma]\nport = {port}")
    done = at.synapse("discover", expect=None)
    assert f"port {port} is given to two models" in done.err
    assert at.pids() == pids
    assert set(at.rows()) == set(NAMES)


def test_the_rejected_file_copied_back_as_it_is_is_not_tried_again(
    at: Deployment, flag: str
) -> None:
    """Also with the reason on top."""
    former = Former(at, "beta")
    edit(at, "beta", flag)
    at.ctl("update")
    former.serves_again()
    log = at.log_of("beta").count(flag)
    again = Former(at, "beta")
    block(at, "beta").write_text(rejected(at, "beta").read_text())
    at.ctl("update")
    again.serves_again()
    assert at.log_of("beta").count(flag) == log


def test_a_command_that_is_no_server_goes_back(at: Deployment) -> None:
    """It runs and will never be ready, and that is said."""
    former = Former(at, "beta")
    text = re.sub(r"^command=.*$", "command=/bin/sleep 1000", former.text, flags=re.MULTILINE)
    block(at, "beta").write_text(text)
    at.ctl("update")
    row = former.serves_again(within=2 * BACK_SECONDS)
    assert "no llama-server" in row["last_failure"]["message"]


def test_an_edit_in_the_way_of_a_rollback_is_kept_and_said(at: Deployment, flag: str) -> None:
    """Whoever is at work on the block is told what keeps the model from serving; `update` does."""
    former = Former(at, "beta")
    edit(at, "beta", "--temp 0.7")
    at.ctl("update")
    wait_until(lambda: "--temp" in arguments(at, "beta"), promised(BACK_SECONDS), "on trial")
    newer = edit(at, "beta", "--temp 0.8")
    at.servers()["beta"].kill()
    wait_until(
        lambda: "was edited since" in at.rows()["beta"]["reason"]
        or at.rows()["beta"]["phase"] == "ready",
        promised(BACK_SECONDS), "told",
    )  # fmt: skip
    assert block(at, "beta").read_text() == newer
    at.ctl("update")
    wait_until(lambda: "0.8" in arguments(at, "beta"), promised(BACK_SECONDS), "the newer edit")
    at.wait_for_rows({"beta": "ready"}, promised(BACK_SECONDS))
    assert {name for name, pid in at.pids().items() if pid != former.pids[name]} == {"beta"}
