"""From files to models that answer: every command and surface, on real servers.

Two deployments stay up over many tests to save time: `demo` (a first run on an empty cache) and
the fleet. A test that changes the fleet gets it as `changing` and finds it restored afterwards.
"""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import Engine
from tests.gguf_factory import (
    write_adapter,
    write_draft,
    write_embedding,
    write_imatrix,
    write_model,
    write_reranker,
    write_split,
    write_vocabulary_only,
)
from tests.integration.harness import (
    Deployment,
    Done,
    ask,
    chat,
    deployed,
    foreground,
    holds_for,
    http,
    picture,
    stranger_on,
    wait_until,
    write_working_projector,
)
from tests.ports import free_ports, port_is_free

pytestmark = pytest.mark.usefixtures("llama_server")

CONTRACT_FIELDS = {
    "name", "repo", "file", "tier", "enabled", "phase", "state", "pid", "port", "url", "alias",
    "context", "parallel", "device", "memory", "slots", "restarts", "ready_seconds", "generation",
    "trial", "last_failure", "next_retry_in",
}  # fmt: skip


def _curl_line(text: str) -> str:
    """The line with curl that was shown, as it can be copied."""
    found = re.search(r"^\s*(curl .*?)\s*$", text, re.MULTILINE)
    assert found, text
    return found[1]


def _answer(done: Done) -> str:
    """What a curl line's answer says; `Done` holds only strict UTF-8 already."""
    content: str = done.json()["choices"][0]["message"]["content"]
    return content


def _gone(processes: list[psutil.Process]) -> bool:
    """Whether all have ended; a zombie has, and only waits for whoever inherited it."""
    return not any(map(_runs, processes))


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# --- a first run ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Demo:
    """The deployment of a first run on an empty cache, and what that run said."""

    at: Deployment
    first: Done

    def ensure_up(self) -> None:
        if not self.at.processes():
            self.at.synapse("up", "--detach")

    def ensure_down(self) -> None:
        if self.at.processes():
            self.at.down()


@pytest.fixture(scope="module")
def demo(llama_server: Engine) -> Iterator[Demo]:
    with deployed() as deployment:
        yield Demo(deployment, deployment.synapse("up", "--detach"))


def test_a_first_run_generates_a_model_and_says_so(demo: Demo) -> None:
    """An empty cache is no dead end, and nobody takes the demo for a real model."""
    generated = list(demo.at.hub.root.rglob("snapshots/*/*.gguf"))
    assert len(generated) == 1
    assert str(generated[0]) in demo.first.text
    assert "generated" in demo.first.text


def test_the_curl_line_of_a_first_run_answers_in_a_shell(demo: Demo) -> None:
    demo.ensure_up()
    line = _curl_line(demo.first.out)
    assert _answer(demo.at.shell(line)).strip()
    code = demo.at.shell(line + " -o /dev/null -w '%{http_code}'")
    assert code.out == "200"


def test_the_table_of_a_first_run_names_what_one_needs_to_know(demo: Demo) -> None:
    """Name, tier, phase, port and URL."""
    demo.ensure_up()
    (model,) = demo.at.models().values()
    row = next(line for line in demo.first.out.splitlines() if line.startswith(model["name"]))
    assert row.split()[:5] == [
        model["name"], model["tier"], "ready", str(model["port"]), model["url"],
    ]  # fmt: skip


def test_up_on_what_is_up_changes_nothing(demo: Demo) -> None:
    demo.ensure_up()
    before, supervisord = demo.at.pids(), demo.at.supervisord()
    demo.at.synapse("up", "--detach")
    assert (demo.at.pids(), demo.at.supervisord()) == (before, supervisord)


def test_init_never_overwrites(demo: Demo) -> None:
    """Neither what the user wrote nor what stands there already."""
    files = [demo.at.etc / "supervisord.conf", demo.at.etc / "synapse.conf"]
    kept = [file.read_text() for file in files]
    for file, text in zip(files, kept, strict=True):
        file.write_text(text + "; mine\n")
    demo.at.synapse("init")
    assert [file.read_text() for file in files] == [text + "; mine\n" for text in kept]
    for file, text in zip(files, kept, strict=True):
        file.write_text(text)


def test_the_control_socket_is_for_its_owner_only(demo: Demo) -> None:
    demo.ensure_up()
    assert (demo.at.prefix / "var/run/supervisor.sock").stat().st_mode & 0o077 == 0


def test_down_leaves_no_process_and_no_port_taken(demo: Demo) -> None:
    """And a second `down` finds nothing to do, which is fine."""
    demo.ensure_up()
    (model,) = demo.at.models().values()
    supervisord = demo.at.supervisord()
    processes = [supervisord, *supervisord.children(recursive=True), *demo.at.processes()]
    demo.at.down()
    assert _gone(processes)
    assert demo.at.processes() == []
    assert port_is_free(model["port"])
    demo.at.down()


def test_without_supervisord_supervisorctl_fails(demo: Demo) -> None:
    demo.ensure_down()
    assert demo.at.ctl("models", expect=None).status != 0


def test_in_a_terminal_there_is_a_progress_bar_and_ctrl_c_leaves_nothing(demo: Demo) -> None:
    """Real keys in a real terminal: every process of the foreground group gets the signal."""
    demo.ensure_down()
    with foreground(demo.at, "up", terminal=True) as up:
        shown = up.wait_for("Ctrl-C")
        assert re.search(r"\r(?!\n)", shown), "nothing was drawn over: no progress bar"
        assert "\x1b[" in shown
        for heading in ("NAME", "TIER", "PHASE", "PORT", "URL"):
            assert heading in shown
        assert _answer(demo.at.shell(_curl_line(shown))).strip()
        supervisord = demo.at.supervisord()
        processes = [supervisord, *supervisord.children(recursive=True)]
        up.press_ctrl_c()
        assert up.end() == 0, up.said
    assert _gone(processes)
    assert demo.at.processes() == []
    assert "Traceback" not in up.said


def test_without_a_terminal_there_are_lines_and_ctrl_c_leaves_nothing(demo: Demo) -> None:
    """A log of a service wants lines: nothing is drawn over and nothing is coloured."""
    demo.ensure_down()
    with foreground(demo.at, "up", terminal=False) as up:
        said = up.wait_for("curl ")
        assert "\r" not in said
        assert "\x1b" not in said
        lines = [line for line in said.splitlines() if "demo" in line]
        assert any("loading" in line for line in lines)
        assert any("ready" in line for line in lines)
        supervisord = demo.at.supervisord()
        processes = [supervisord, *supervisord.children(recursive=True)]
        up.press_ctrl_c()
        assert up.end() == 0, up.said
    assert _gone(processes)
    assert demo.at.processes() == []
    assert "Traceback" not in up.said


def test_ctrl_c_before_the_models_are_ready_leaves_nothing(demo: Demo) -> None:
    demo.ensure_down()
    with foreground(demo.at, "up", terminal=False) as up:
        up.wait_for("loading")
        up.press_ctrl_c()
        assert up.end() == 0, up.said
    assert demo.at.processes() == []
    assert "Traceback" not in up.said


def test_a_killed_supervisord_takes_all_with_it_and_up_works_again(demo: Demo) -> None:
    """No orphan holds a port or memory, and what it left on disk is in nobody's way."""
    demo.ensure_up()
    supervisord = demo.at.supervisord()
    processes = supervisord.children(recursive=True)
    assert len(processes) >= 3
    supervisord.send_signal(signal.SIGKILL)
    wait_until(lambda: _gone(processes), 5, "all processes gone")
    assert demo.at.processes() == []
    demo.at.synapse("up", "--detach")
    (model,) = demo.at.wait_ready().values()
    assert chat(model)


def test_a_killed_launcher_takes_its_server_with_it(demo: Demo) -> None:
    demo.ensure_up()
    (model,) = demo.at.wait_ready().values()
    launcher = psutil.Process(model["pid"])
    (server,) = launcher.children(recursive=True)
    launcher.send_signal(signal.SIGKILL)
    wait_until(lambda: _gone([server]), 5, "the server gone")
    demo.at.down()


def test_a_killed_listener_costs_no_model_and_comes_back(demo: Demo) -> None:
    demo.ensure_up()
    (model,) = demo.at.wait_ready().values()
    listener = int(demo.at.ctl("pid", "synapse").out)
    psutil.Process(listener).send_signal(signal.SIGKILL)

    def again() -> bool:
        said = demo.at.ctl("pid", "synapse", expect=None).out.strip()
        return said.isdigit() and int(said) not in (0, listener)

    wait_until(again, 15, "another listener")
    (after,) = demo.at.wait_ready().values()
    assert after["pid"] == model["pid"]
    assert chat(after)


def test_without_an_engine_it_says_how_to_get_one(demo: Demo) -> None:
    demo.ensure_down()
    demo.at.configure("engine = /nonexistent/llama-server")
    try:
        done = demo.at.synapse("up", "--detach", expect=2)
    finally:
        demo.at.configure()
    assert "/nonexistent/llama-server" in done.err
    assert "engine" in done.err
    assert "Traceback" not in done.err
    assert demo.at.processes() == []


# --- the fleet -----------------------------------------------------------------------------------

FLEET = {  # (repo, file): role, for what can be told by repo
    ("acme/chat-GGUF", "chat-Q4_K_M.gguf"): "text",
    ("acme/chat-GGUF", "chat-Q8_0.gguf"): "text",
    ("acme/two", "two-00001-of-00002.gguf"): "text",
    ("acme/embed", "embed-f16.gguf"): "embedding",
    ("acme/rank", "rank-f16.gguf"): "reranker",
    ("acme/sight", "sight-f16.gguf"): "vision",
    ("acme/sketch", "sketch.gguf"): "draft",
}
STUDIO = "studio-f16.gguf"


def _fill(deployment: Deployment) -> Path:
    """Everything that may lie in a cache; and a folder of LM Studio, which is returned."""
    hub, own = deployment.hub, deployment.sources
    chat_repo = "acme/chat-GGUF"
    old = write_model(own / "old.gguf", seed=9, file_type="Q4_K_M", name="Chat")
    hub.add(chat_repo, {"chat-Q4_K_M.gguf": old}, revision="yesterday", ref=None)
    hub.add(chat_repo, {
        "chat-Q4_K_M.gguf": write_model(own / "q4.gguf", file_type="Q4_K_M", name="Chat"),
        "chat-Q8_0.gguf": write_model(own / "q8.gguf", seed=1, file_type="Q8_0", name="Chat"),
    })  # fmt: skip
    hub.add("acme/two", {shard.name: shard for shard in write_split(own, "two", seed=2)})
    hub.add("acme/embed", {"embed-f16.gguf": write_embedding(own / "embed.gguf")})
    hub.add("acme/rank", {"rank-f16.gguf": write_reranker(own / "rank.gguf")})
    hub.add("acme/sight", {
        "sight-f16.gguf": write_model(own / "sight.gguf", seed=3),
        "mmproj-sight-f16.gguf": write_working_projector(own / "mmproj.gguf"),
    })  # fmt: skip
    hub.add("acme/sketch", {"sketch.gguf": write_draft(own / "sketch.gguf")})
    hub.add("acme/lora", {"lora-f16.gguf": write_adapter(own / "lora.gguf")})
    hub.add("acme/words", {"words.gguf": write_vocabulary_only(own / "words.gguf")})
    hub.add("acme/matrix", {"imatrix.gguf": write_imatrix(own / "matrix.gguf")})
    hub.add_incomplete("acme/broken", "broken-f16.gguf")
    hub.add_dangling("acme/gone", "gone-f16.gguf")
    shards = write_split(own, "half", seed=5)
    hub.add("acme/half", {shards[0].name: shards[0]})
    studio = deployment.root / "studio"
    write_model(studio / "publisher" / "repo" / STUDIO, seed=4)
    return studio


@dataclass(frozen=True, slots=True)
class Fleet:
    """A running deployment with one of everything."""

    at: Deployment
    settings: str
    up: Done
    web_port: int

    def name_of(self, file: str) -> str:
        """The program name of a file."""
        (name,) = (name for name, model in self.at.models().items() if model["file"].endswith(file))
        return name

    def restore(self) -> None:
        """As it was: settings, cache, blocks, and every enabled model ready."""
        self.at.configure(self.settings)
        for repo in self.at.hub.root.glob("models--added--*"):
            shutil.rmtree(repo)
        found = self.at.discover()
        for name in found["changes"]["kept"]:
            self.at.discover("--force", name)
        for name, model in self.at.models().items():
            if model["enabled"] and model["phase"] == "stopped":
                self.at.ctl("start", name)
        self.at.wait_ready()


@pytest.fixture(scope="module")
def fleet(llama_server: Engine) -> Iterator[Fleet]:
    with deployed() as deployment:
        settings = f"model_dirs = {_fill(deployment)}"
        deployment.configure(settings)
        deployment.synapse("init")
        web_port = free_ports(1)
        with (deployment.etc / "supervisord.conf").open("a") as main_file:
            main_file.write(
                f"\n[inet_http_server]\nport=127.0.0.1:{web_port}\n"
                "username=someone\npassword=secret\n"
            )
        up = deployment.synapse("up", "--detach", expect=None)
        yield Fleet(deployment, settings, up, web_port)


@pytest.fixture
def changing(fleet: Fleet) -> Iterator[Fleet]:
    """The fleet for a test that changes it."""
    fleet.at.wait_ready()
    yield fleet
    fleet.restore()


def _units(found: Any) -> dict[tuple[str, str], str]:
    """Role by repo and file, of what came from the hub cache."""
    return {
        (model["repo"], model["file"]): model["role"]
        for model in found["models"]
        if (model["repo"], model["file"]) in FLEET or not model["file"].endswith(STUDIO)
    }


def test_up_succeeds_and_everything_enabled_is_ready(fleet: Fleet) -> None:
    assert fleet.up.status == 0, fleet.up
    models = fleet.at.models()
    phases = {name: model["phase"] for name, model in models.items() if model["enabled"]}
    assert set(phases.values()) == {"ready"}, phases
    assert len(phases) == 6, phases


def test_discovery_lists_exactly_the_loadable_units(fleet: Fleet) -> None:
    """Shards are one, a projector belongs to its model, and what is no model is none."""
    found = fleet.at.discover("--dry-run")
    assert _units(found) == FLEET
    (studio,) = (model for model in found["models"] if model["file"].endswith(STUDIO))
    assert studio["role"] == "text"
    assert len(found["models"]) == len(FLEET) + 1


def test_each_listed_model_says_where_it_lies_and_what_it_is(fleet: Fleet) -> None:
    by_file = {model["file"]: model for model in fleet.at.discover("--dry-run")["models"]}
    assert {model["tier"] for model in by_file.values()} == {"FAST"}
    assert all(Path(model["path"]).is_file() for model in by_file.values())
    assert by_file["chat-Q4_K_M.gguf"]["quantization"] == "Q4_K_M"
    assert len(by_file["two-00001-of-00002.gguf"]["shards"]) == 2
    assert by_file["sight-f16.gguf"]["projector"].endswith("mmproj-sight-f16.gguf")
    assert by_file["chat-Q8_0.gguf"]["projector"] is None
    ports = [model["port"] for model in by_file.values()]
    assert len(set(ports)) == len(ports)
    assert set(ports) <= set(fleet.at.ports)


def test_what_refs_main_names_is_served_not_an_older_revision(fleet: Fleet) -> None:
    (model,) = (m for m in fleet.at.plan()["models"] if m["file"] == "chat-Q4_K_M.gguf")
    assert Path(model["path"]).samefile(
        fleet.at.hub.snapshot("acme/chat-GGUF") / "chat-Q4_K_M.gguf"
    )


def test_one_quantization_of_a_repo_is_enabled(fleet: Fleet) -> None:
    models = [m for m in fleet.at.models().values() if m["repo"] == "acme/chat-GGUF"]
    assert len(models) == 2
    assert [model["enabled"] for model in models].count(True) == 1


@pytest.mark.parametrize("repo", ["acme/broken", "acme/gone", "acme/half"])
def test_what_cannot_be_served_is_reported_with_a_remedy(fleet: Fleet, repo: str) -> None:
    """An unfinished download, a dangling link, a missing shard."""
    done = fleet.at.synapse("discover", "--dry-run", "--json")
    problems = [p for p in done.json()["problems"] if repo in p["subject"]]
    assert len(problems) == 1, done
    assert problems[0]["reason"]
    assert problems[0]["remedy"]


def test_a_dry_run_and_a_plan_touch_nothing(fleet: Fleet) -> None:
    before, pids = fleet.at.blocks(), fleet.at.pids()
    fleet.at.hub.add("added/dry", {"dry.gguf": write_model(fleet.at.sources / "dry.gguf", seed=20)})
    try:
        assert fleet.at.discover("--dry-run")["changes"]["added"] == ["dry"]
        assert "dry" in [model["name"] for model in fleet.at.plan()["models"]]
    finally:
        shutil.rmtree(fleet.at.hub.repo("added/dry"))
    assert (fleet.at.blocks(), fleet.at.pids()) == (before, pids)


@pytest.mark.parametrize("file", ["chat-Q4_K_M.gguf", "two-00001-of-00002.gguf", STUDIO])
def test_a_text_model_chats(fleet: Fleet, file: str) -> None:
    models = [m for m in fleet.at.models().values() if m["file"].endswith(file)]
    assert chat(models[0])


def test_an_embedding_model_embeds(fleet: Fleet) -> None:
    model = fleet.at.model(fleet.name_of("embed-f16.gguf"))
    answer = ask(f"{model['url']}/v1/embeddings", {"model": model["alias"], "input": "Hello"})
    assert len(answer["data"][0]["embedding"]) == 64


def test_a_reranker_ranks(fleet: Fleet) -> None:
    model = fleet.at.model(fleet.name_of("rank-f16.gguf"))
    question = {"model": model["alias"], "query": "river", "documents": ["road", "river"]}
    assert len(ask(f"{model['url']}/v1/rerank", question)["results"]) == 2


def test_a_vision_model_looks_at_a_picture(fleet: Fleet) -> None:
    """The projector is not only listed: it is loaded."""
    model = fleet.at.model(fleet.name_of("sight-f16.gguf"))
    assert chat(model, [picture(), {"type": "text", "text": "What is this?"}])


def test_models_as_json_keeps_the_contract(fleet: Fleet) -> None:
    models = fleet.at.ctl("models", "--json").json()
    assert isinstance(models, list)
    for model in models:
        assert set(model) >= CONTRACT_FIELDS
        assert set(model["memory"]) >= {"estimated", "source", "measured"}
        assert set(model["slots"]) >= {"busy", "total"}
        assert model["tier"] in ("FAST", "BALANCED", "POWERFUL")
        assert re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", model["name"])
        assert model["url"] == f"http://127.0.0.1:{model['port']}"
        assert isinstance(model["memory"]["estimated"], int)
        assert model["memory"]["source"]
        assert isinstance(model["generation"], int)
        assert isinstance(model["trial"], bool)


def test_a_ready_model_in_json_is_what_the_system_says_it_is(fleet: Fleet) -> None:
    for model in fleet.at.models().values():
        if not model["enabled"]:
            assert (model["phase"], model["state"], model["pid"] or 0) == ("disabled", "STOPPED", 0)
            continue
        assert (model["phase"], model["state"]) == ("ready", "RUNNING")
        assert str(fleet.at.root) in " ".join(psutil.Process(model["pid"]).cmdline())
        assert model["memory"]["measured"] > 2**20
        assert model["slots"] == {"busy": 0, "total": model["parallel"]}
        assert model["restarts"] == 0
        assert 0 < model["ready_seconds"] < 60
        assert model["last_failure"] is None
        assert model["next_retry_in"] is None
        assert http(f"{model['url']}/health")[0] == 200


def test_models_as_a_table_shows_each_model(fleet: Fleet) -> None:
    table = fleet.at.ctl("models").out.splitlines()
    for word in ("NAME", "TIER", "PHASE", "PORT"):
        assert word in table[0]
    rows = {line.split()[0]: line for line in table[1:] if line.strip()}
    for name, model in fleet.at.models().items():
        assert model["tier"] in rows[name]
        assert model["phase"] in rows[name]
        assert str(model["port"]) in rows[name]


def test_supervisorctl_status_shows_each_model(fleet: Fleet) -> None:
    """Status 3 is supervisorctl's own way to say that something is stopped."""
    status = fleet.at.ctl("status", expect=3).out
    states = {line.split()[0]: line.split()[1] for line in status.splitlines()}
    for name, model in fleet.at.models().items():
        assert states[name] == ("RUNNING" if model["enabled"] else "STOPPED")
    assert states["synapse"] == "RUNNING"


def test_the_stock_web_page_shows_each_model_behind_its_password(fleet: Fleet) -> None:
    page = f"http://127.0.0.1:{fleet.web_port}/"
    assert http(page)[0] == 401
    assert http(page, login=("someone", "wrong"))[0] == 401
    status, body = http(page, login=("someone", "secret"))
    assert status == 200
    for name in fleet.at.models():
        assert name in body.decode()


def test_discover_twice_changes_nothing(fleet: Fleet) -> None:
    blocks, pids = fleet.at.blocks(), fleet.at.pids()
    changes = fleet.at.discover()["changes"]
    assert sorted(changes.pop("unchanged")) == sorted(fleet.at.models())
    assert set(changes) == {"added", "changed", "removed", "kept"}
    assert not any(changes.values()), changes
    assert (fleet.at.blocks(), fleet.at.pids()) == (blocks, pids)


def test_discover_runs_as_a_program_of_supervisord_too(fleet: Fleet) -> None:
    """What Start of `discover` in the web page does."""
    blocks, pids = fleet.at.blocks(), fleet.at.pids()
    fleet.at.ctl("start", "discover")

    def ended() -> bool:
        return fleet.at.ctl("status", "discover", expect=None).out.split()[1] == "EXITED"

    wait_until(ended, 30, "discover has run")
    said = (fleet.at.log / "discover.log").read_text()
    assert "Traceback" not in said
    assert "nothing has changed" in said
    assert (fleet.at.blocks(), fleet.at.pids()) == (blocks, pids)


def test_an_added_model_comes_up_and_a_removed_one_goes_and_the_others_stay(
    changing: Fleet,
) -> None:
    """And where it comes back, it has its name and its port again."""
    at = changing.at
    blocks, pids = at.blocks(), at.pids()
    file = write_model(at.sources / "added.gguf", seed=30)
    at.hub.add("added/one", {"aaa-added.gguf": file})

    assert at.discover()["changes"]["added"] == ["aaa-added"]
    added = at.wait_for({"aaa-added": "ready"})["aaa-added"]
    assert chat(added)
    assert pids.items() <= at.pids().items()
    assert blocks.items() <= at.blocks().items()

    processes = [psutil.Process(added["pid"]), at.servers()["aaa-added"]]
    shutil.rmtree(at.hub.repo("added/one"))
    assert at.discover()["changes"]["removed"] == ["aaa-added"]
    wait_until(lambda: _gone(processes), 15, "the removed model's processes gone")
    assert (at.blocks(), at.pids()) == (blocks, pids)
    assert "aaa-added" not in at.ctl("status", expect=None).out
    wait_until(lambda: "aaa-added" not in at.models(), 15, "no longer listed")

    at.hub.add("added/one", {"aaa-added.gguf": file})
    (again,) = (model for model in at.plan()["models"] if model["repo"] == "added/one")
    assert (again["name"], again["port"]) == ("aaa-added", added["port"])


def test_an_edited_setting_restarts_only_its_model(changing: Fleet) -> None:
    at, name = changing.at, changing.name_of("chat-Q4_K_M.gguf")
    pids = at.pids()
    at.configure(f"{changing.settings}\n[model:{name}]\ncontext = 256")
    changes = at.discover()["changes"]
    assert changes["changed"] == [name]
    assert not changes["added"] + changes["removed"] + changes["kept"]

    def restarted() -> bool:
        model = at.model(name)
        return model["phase"] == "ready" and model["pid"] != pids[name]

    wait_until(restarted, 30, "the changed model is ready again")
    after = at.pids()
    assert {other for other in pids if after[other] != pids[other]} == {name}
    assert at.model(name)["context"] == 256
    assert _argument(at, name, "--ctx-size") == "256"


def _argument(deployment: Deployment, name: str, option: str) -> str:
    """What a running server was really given."""
    words = deployment.servers()[name].cmdline()
    return words[words.index(option) + 1]


def _edit_by_hand(deployment: Deployment, name: str) -> str:
    """Set another context in a block, as a user would; the new text."""
    block = deployment.conf_d / f"{name}.conf"
    text = re.sub(r"--ctx-size \d+", "--ctx-size 300", block.read_text())
    assert "--ctx-size 300" in text
    block.write_text(text)
    return text


def test_a_hand_edited_block_lives_until_it_is_forced(changing: Fleet) -> None:
    """`supervisorctl update` stops the model, the listener starts it, discovery keeps the edit."""
    at, name = changing.at, changing.name_of("two-00001-of-00002.gguf")
    pids = at.pids()
    edited = _edit_by_hand(at, name)
    at.ctl("update")

    def with_edit() -> bool:
        model = at.model(name)
        return model["phase"] == "ready" and model["pid"] != pids[name]

    wait_until(with_edit, 30, "back with the edit")
    assert _argument(at, name, "--ctx-size") == "300"
    assert {other for other, pid in at.pids().items() if pid != pids[other]} == {name}

    pid = at.pids()[name]
    assert at.discover()["changes"]["kept"] == [name]
    assert (at.conf_d / f"{name}.conf").read_text() == edited
    assert at.pids()[name] == pid

    assert at.discover("--force", name)["changes"]["changed"] == [name]
    assert (at.conf_d / f"{name}.conf").read_text() != edited

    def forced() -> bool:
        model = at.model(name)
        return model["phase"] == "ready" and model["pid"] != pid

    wait_until(forced, 30, "back without the edit")
    assert _argument(at, name, "--ctx-size") != "300"


def test_where_both_changed_a_block_the_hand_edit_stays_and_ours_lies_beside(
    changing: Fleet,
) -> None:
    at, name = changing.at, changing.name_of(STUDIO)
    edited = _edit_by_hand(at, name)
    at.configure(f"{changing.settings}\n[model:{name}]\ncontext = 256")
    assert at.discover()["changes"]["kept"] == [name]
    assert (at.conf_d / f"{name}.conf").read_text() == edited
    assert "--ctx-size 256" in (at.conf_d / f"{name}.conf.new").read_text()


def test_a_stopped_model_stays_stopped_until_it_is_started(changing: Fleet) -> None:
    """Neither the listener nor a discovery starts it against the user's will."""
    at, name = changing.at, changing.name_of("chat-Q4_K_M.gguf")
    before = at.model(name)
    at.ctl("stop", name)
    stopped = at.wait_for({name: "stopped"})[name]
    assert stopped["state"] == "STOPPED"
    assert port_is_free(before["port"])

    def still_stopped() -> bool:
        model = at.model(name)
        return (model["phase"], model["state"]) == ("stopped", "STOPPED")

    at.discover()
    assert holds_for(still_stopped, 3), at.model(name)
    assert name not in at.servers()

    at.ctl("start", name)
    started = at.wait_for({name: "ready"})[name]
    assert started["port"] == before["port"]
    assert chat(started)


@pytest.mark.real
def test_the_real_model_joins_the_fleet_and_can_count(
    changing: Fleet, servable_model: Path
) -> None:
    at = changing.at
    pids = at.pids()
    quantization = "F16" if "f16" in servable_model.name else "Q4_K_M"
    unit = ("added/gemma-3-270m-GGUF", f"gemma-3-270m-{quantization}.gguf")
    at.hub.add(unit[0], {unit[1]: servable_model})
    found = at.discover()
    assert _units(found) == FLEET | {unit: "text"}
    (listed,) = (model for model in found["models"] if model["repo"] == unit[0])
    assert (listed["tier"], listed["quantization"]) == ("FAST", quantization)
    assert 260e6 < listed["parameters"] < 440e6
    model = at.wait_for({listed["name"]: "ready"})[listed["name"]]
    prompt = "One, two, three, four, five, six,"
    question = {"prompt": prompt, "max_tokens": 8, "temperature": 0}
    answer = ask(f"{model['url']}/v1/completions", question)
    assert "seven" in answer["choices"][0]["text"]
    assert pids.items() <= at.pids().items()


# --- order, ports, exit statuses -----------------------------------------------------------------

TIERS = """
max_parallel = 1
[tier:fast]
max_parameters = 100K
[tier:balanced]
max_parameters = 300K
"""


@pytest.fixture(scope="module")
def waves(llama_server: Engine) -> Iterator[tuple[Deployment, Any]]:
    """Three tiers, one loading place; the names and the ages would put them the other way round."""
    with deployed() as deployment:
        add, own = deployment.hub.add, deployment.sources
        add("acme/a", {"a-powerful.gguf": write_model(own / "a.gguf", layers=8, embedding=128)})
        add("acme/m", {"m-balanced.gguf": write_model(own / "m.gguf", layers=4)})
        add("acme/z", {"z-fast.gguf": write_model(own / "z.gguf")})
        deployment.configure(TIERS)
        deployment.synapse("init")
        plan = deployment.plan()
        deployment.synapse("up", "--detach")
        yield deployment, plan


ORDER = ["z-fast", "m-balanced", "a-powerful"]


def test_the_plan_shows_the_waves_before_anything_starts(waves: tuple[Deployment, Any]) -> None:
    plan = waves[1]
    assert plan["waves"] == [[name] for name in ORDER]
    tiers = {model["name"]: model["tier"] for model in plan["models"]}
    assert [tiers[name] for name in ORDER] == ["FAST", "BALANCED", "POWERFUL"]


def test_never_more_load_at_once_than_max_parallel(waves: tuple[Deployment, Any]) -> None:
    loading: set[str] = set()
    for step in waves[0].history():
        if step["to"] == "loading":
            loading.add(step["model"])
        else:
            loading.discard(step["model"])
        assert len(loading) <= 1, loading
    started = [step["model"] for step in waves[0].history() if step["to"] == "loading"]
    assert started == ORDER


def test_the_processes_themselves_started_fast_first(waves: tuple[Deployment, Any]) -> None:
    servers = waves[0].servers()
    assert sorted(servers, key=lambda name: servers[name].create_time()) == ORDER


def test_every_transition_has_a_time_and_a_reason(waves: tuple[Deployment, Any]) -> None:
    history = waves[0].history()
    assert [step["when"] for step in history] == sorted(step["when"] for step in history)
    assert all(step["reason"] for step in history)


def test_ports_are_stable_and_a_strangers_port_is_avoided(llama_server: Engine) -> None:
    """Over runs, over a model that sorts before the others, and over one that went and came."""
    with deployed() as deployment:
        own = deployment.sources
        deployment.hub.add("acme/m", {"mmm.gguf": write_model(own / "m.gguf")})
        deployment.hub.add("acme/n", {"nnn.gguf": write_model(own / "n.gguf", seed=1)})
        deployment.synapse("init")
        with stranger_on(deployment.first_port):
            ports = _ports(deployment)
        assert deployment.first_port not in ports.values()
        assert len(set(ports.values())) == 2
        assert _ports(deployment) == ports

        deployment.hub.add("acme/a", {"aaa.gguf": write_model(own / "a.gguf", seed=2)})
        after = _ports(deployment)
        assert ports.items() < after.items()
        assert after["aaa"] not in ports.values()


def test_a_model_whose_port_a_stranger_took_meanwhile_gets_another(llama_server: Engine) -> None:
    with deployed() as deployment:
        own = deployment.sources
        deployment.hub.add("acme/m", {"mmm.gguf": write_model(own / "m.gguf")})
        deployment.synapse("init")
        before = _ports(deployment)["mmm"]
        with stranger_on(before):
            deployment.synapse("up", "--detach")
            model = deployment.model("mmm")
            assert model["port"] != before
            assert model["port"] in deployment.ports
            assert chat(model)


def _ports(deployment: Deployment) -> dict[str, int]:
    return {model["name"]: model["port"] for model in deployment.discover()["models"]}


def test_a_model_that_fails_makes_up_fail_and_holds_back_no_other(llama_server: Engine) -> None:
    """Exit status 1, the class and the server's own words; the next model is served."""
    with deployed("max_parallel = 1") as deployment:
        own = deployment.sources
        bad = write_model(own / "bad.gguf", extra={"tokenizer.ggml.model": "nonsense"})
        deployment.hub.add("acme/bad", {"aaa-bad.gguf": bad})
        deployment.hub.add("acme/good", {"zzz-good.gguf": write_model(own / "good.gguf", layers=2)})
        done = deployment.synapse("up", "--detach", expect=1)
        assert "aaa-bad" in done.text
        models = deployment.models()
        assert models["zzz-good"]["phase"] == "ready"
        assert chat(models["zzz-good"])
        assert models["aaa-bad"]["phase"] in ("failed", "backoff", "loading", "pending")
        failure = wait_until(lambda: deployment.model("aaa-bad")["last_failure"], 15, "a failure")
        assert set(failure) >= {"class", "message", "at"}
        assert failure["message"]


@pytest.mark.parametrize("arguments", [
    (), ("nonsense",), ("up", "--nonsense"), ("discover", "--force"),
    ("discover",), ("plan",), ("plan", "--json"),
])  # fmt: skip
def test_bad_usage_ends_with_status_2_and_a_line_on_stderr(arguments: tuple[str, ...]) -> None:
    """Also where there is no deployment yet, for what needs one."""
    with deployed() as deployment:
        shutil.rmtree(deployment.prefix)
        done = deployment.synapse(*arguments, expect=2)
        assert done.out == ""
        assert done.err.strip()
        assert "Traceback" not in done.err
        assert not deployment.prefix.exists()
