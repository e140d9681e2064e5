"""Bad input, from outside to the surfaces: it costs at most itself, and says how to be mended.

Two deployments stay up over many tests to save time: `besieged`, whose cache and model folder
hold everything hostile at once beside one good model, and `steady`, whose settings, templates,
state and permissions are broken one at a time and which must not feel it.
"""

from __future__ import annotations

import configparser
import contextlib
import hashlib
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from supervisor_synapse import render
from tests.conftest import Engine
from tests.gguf_factory import write_model
from tests.integration.harness import BIN, Deployment, Done, chat, deployed

pytestmark = pytest.mark.usefixtures("llama_server")

OURS = {"discover", "synapse"}  # the programs of the main file
PRINTABLE = re.compile(r"[\n\x20-\x7e]*")
GOOD = "good-f16"


def _sections(deployment: Deployment) -> dict[str, list[str]]:
    """The sections of each block, as another reader of INI files sees them."""
    found = {}
    for name, (_, content) in deployment.blocks().items():
        if not name.endswith(".conf"):
            continue
        parser = configparser.RawConfigParser(strict=False, interpolation=None)
        parser.read_string(content.decode("utf-8", "strict"))
        assert not parser.defaults(), content
        found[name] = parser.sections()
    return found


def _assert_nothing_injected(deployment: Deployment, names: set[str]) -> None:
    """supervisord holds these programs and ours; each block is one section with its own name."""
    assert set(deployment.programs()) == names | OURS
    assert _sections(deployment) == {f"{name}.conf": [f"program:{name}"] for name in names}


def _assert_plain(text: str) -> None:
    """Nothing that a terminal would obey, and no traceback."""
    assert PRINTABLE.fullmatch(text), ascii(text)
    assert "Traceback" not in text


# --- names, headers, links -----------------------------------------------------------------------

HOSTILE_NAMES = [
    b"x\n[program:evil]\ncommand=touch pwned\n.gguf",
    b"x\r[rpcinterface:evil]\rsupervisor.rpcinterface_factory=os:system.gguf",
    b"close]%(here)s %(ENV_HOME)s %%(x)s.gguf",
    b"semi ;colon #hash.gguf",
    b"quo\"te'\\.gguf",
    b"a..gguf",
    b"all.gguf",
    b"discover.gguf",
    b"--host.gguf",
    b"$(touch pwned)`touch pwned`;touch pwned.gguf",
    b"\x1b[31mred\x07.gguf",
    b"non\xffutf8.gguf",
    "line\u2028\u202egnp.gguf".encode(),
    "\u0430ll.gguf".encode(),  # a cyrillic letter
    b"l" * 250 + b".gguf",
    b"{{ 7*7 }}{% raw %}<script>&*?[a-z].gguf",
]
HOSTILE_REPOS = [
    "all",
    "../../..",
    "ev]il/x\ny",
    "%(here)s/ ;b",
    "-q'\"/--host",
    "a\r[program:e]/x",
]


def _header(version: int = 3, tensors: int = 0, keys: int = 1) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def _key(name: bytes = b"a") -> bytes:
    return struct.pack("<Q", len(name)) + name


def _hostile_headers(good: bytes) -> dict[str, bytes]:
    array, text = 9, 8
    return {
        "tensor-count": _header(tensors=2**40) + good[24:],
        "key-count": _header(keys=2**40) + good[24:],
        "negative-counts": _header(tensors=2**64 - 1, keys=2**64 - 1) + good[24:],
        "key-length": _header() + struct.pack("<Q", 2**40) + b"x" * 100,
        "text-length": _header() + _key() + struct.pack("<IQ", text, 2**40) + b"x" * 100,
        "array-length": _header() + _key() + struct.pack("<IIQ", array, 4, 2**40),
        "texts-length": _header() + _key() + struct.pack("<IIQ", array, text, 2**40) + b"\0" * 9999,
        "deep": _header() + _key() + struct.pack("<I", array) + struct.pack("<IQ", 9, 1) * 100_000,
        "unknown-type": _header() + _key() + struct.pack("<I", 99),
        "version-1": good[:4] + struct.pack("<I", 1) + good[8:],
        "version-4": good[:4] + struct.pack("<I", 4) + good[8:],
        "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + good[24:],
        "magic": b"GGML" + good[4:],
        "cut-1": good[:1],
        "cut-100": good[:100],
        "cut-4000": good[:4000],
        "cut-by-one": good[:-1],
        "empty": b"",
        "zeros": bytes(10_000),
        "web-page": b"<html>Not found</html>",
        "lfs-pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 1\n",
    }  # fmt: skip


HEADERS = sorted(_hostile_headers(bytes(5000)))


@dataclass(frozen=True, slots=True)
class Besieged:
    """A deployment amid hostile files, which is up; what `up` said, and the good model's file."""

    at: Deployment
    folder: Path
    up: Done
    found: Any
    models: dict[str, Any]

    def model_of(self, path: bytes) -> dict[str, Any]:
        """The model that serves the file at `path`."""
        wanted = os.stat(path)
        (model,) = (m for m in self.found["models"] if os.path.samestat(os.stat(m["path"]), wanted))
        assert isinstance(model, dict)
        return model

    def problem_with(self, subject: str) -> dict[str, str]:
        """What is said of one file; exactly once."""
        (problem,) = (p for p in self.found["problems"] if subject in p["subject"])
        assert isinstance(problem, dict)
        return problem


def _fill(deployment: Deployment, folder: Path) -> None:
    own = deployment.sources
    content = write_model(own / "good.gguf").read_bytes()
    deployment.hub.add("acme/good", {"good-f16.gguf": content})
    folder.mkdir()
    for index, name in enumerate(HOSTILE_NAMES):
        path = os.path.join(os.fsencode(folder), name)
        shutil.copyfile(write_model(own / f"{index}.gguf", seed=100 + index), path)
    for index, repo in enumerate(HOSTILE_REPOS):
        _add_repo(deployment, repo, write_model(own / f"r{index}.gguf", seed=200 + index))
    for kind, header in _hostile_headers(content).items():
        (folder / f"bad-{kind}.gguf").write_bytes(header)
    _add_long_paths(folder, write_model(own / "long.gguf", seed=300))
    _add_links(deployment, folder, own)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _add_repo(deployment: Deployment, repo: str, model: Path) -> None:
    """As `HubCache.add`, for a name that only a hostile hub has; one folder whatever it says."""
    at = deployment.hub.root / ("models--" + repo.replace("/", "--"))
    snapshot, blob = at / "snapshots" / ("a" * 40), at / "blobs" / _sha256(model)
    snapshot.mkdir(parents=True)
    blob.parent.mkdir()
    shutil.copyfile(model, blob)
    (snapshot / "m.gguf").symlink_to(f"../../blobs/{blob.name}")
    (at / "refs").mkdir()
    (at / "refs" / "main").write_text("a" * 40)


def _add_long_paths(folder: Path, model: Path) -> None:
    """A file whose path has about 2,500 characters, and one whose path has about 4,000."""
    for name, total in (("longish", 2500), ("far", 4000)):
        at = folder / name
        left = total - len(str(at / "long.gguf"))
        while left > 0:
            part = min(left, 240) if left != 241 else 120
            at /= "d" * (part - 1)
            left -= part
        at.mkdir(parents=True)
        shutil.copyfile(model, at / "long.gguf")
        assert len(str(at / "long.gguf")) == total


def _add_links(deployment: Deployment, folder: Path, own: Path) -> None:
    """Out of the cache, to nowhere, in a circle, to what is no file; and broken repos."""
    hub = deployment.hub
    outside = write_model(own / "outside.gguf", seed=301)
    (hub.snapshot("acme/good") / "outside-f16.gguf").symlink_to(outside)
    (folder / "nowhere.gguf").symlink_to("/nonexistent/x.gguf")
    (folder / "circle.gguf").symlink_to("circle.gguf")
    (folder / "zero.gguf").symlink_to("/dev/zero")
    (folder / "passwords.gguf").symlink_to("/etc/passwd")
    (folder / "myself").symlink_to(folder)
    os.mkfifo(folder / "pipe.gguf")
    (folder / "folder.gguf").mkdir()
    refs = hub.root / "models--acme--refs" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_bytes(b"../../../../etc\n\xff")
    (hub.root / "models--acme--file").write_bytes(b"not a folder")
    os.makedirs(os.path.join(os.fsencode(hub.root), b"models--bad\xff--x", b"snapshots", b"c" * 40))


@pytest.fixture(scope="module")
def besieged(llama_server: Engine) -> Iterator[Besieged]:
    with deployed(ports=80) as deployment:
        folder = deployment.root / "m"
        _fill(deployment, folder)
        deployment.configure(
            f"cache_dirs = {deployment.hub.root}\n  {deployment.root}/no-cache\n"
            f"model_dirs = {folder}\n  {deployment.root}/no-models\n"
            "max_parallel = 8"
        )
        up = deployment.synapse("up", "--detach", expect=None)
        found = deployment.discover("--dry-run")
        yield Besieged(deployment, folder, up, found, deployment.models())


def test_the_good_model_amid_hostile_files_answers(besieged: Besieged) -> None:
    model = besieged.models[GOOD]
    assert model["phase"] == "ready"
    assert chat(model)


def test_up_amid_hostile_files_succeeds_and_obeys_none_of_them(besieged: Besieged) -> None:
    """Every model that can be served is; nothing was run, and nothing unprintable was shown."""
    assert besieged.up.status == 0, besieged.up
    _assert_plain(besieged.up.text)
    assert not list(besieged.at.root.rglob("pwned"))
    assert {m["phase"] for m in besieged.models.values()} == {"ready"}


def test_supervisord_holds_exactly_the_programs_that_were_found(besieged: Besieged) -> None:
    names = {model["name"] for model in besieged.found["models"]}
    assert len(names) == len(besieged.found["models"])
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", name) for name in names)
    assert not names & {"all", "discover", "gateway", "synapse", "evil"}
    _assert_nothing_injected(besieged.at, names)


def test_each_server_is_given_exactly_what_was_planned(besieged: Besieged) -> None:
    """Word for word, through two rounds of quoting and the launcher, to the process itself."""
    programs, servers = besieged.at.programs(), besieged.at.servers()
    for model in besieged.found["models"]:
        words = programs[model["name"]]
        given = words[words.index("--") + 1 :]
        assert given[1:2] == ["--model"], given
        assert os.path.samefile(given[2], model["path"])
        assert given[3:] == model["arguments"]
        assert servers[model["alias"]].cmdline() == given


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=ascii)
def test_a_file_with_a_hostile_name_is_served_under_a_safe_one(
    besieged: Besieged, name: bytes
) -> None:
    model = besieged.model_of(os.path.join(os.fsencode(besieged.folder), name))
    assert PRINTABLE.fullmatch(model["file"])
    assert "\n" not in model["file"]
    assert chat(besieged.models[model["name"]])


@pytest.mark.parametrize("repo", HOSTILE_REPOS, ids=ascii)
def test_a_repo_with_a_hostile_name_is_served_from_where_it_lies(
    besieged: Besieged, repo: str
) -> None:
    folder = besieged.at.hub.root / ("models--" + repo.replace("/", "--"))
    (blob,) = (folder / "blobs").iterdir()
    model = besieged.model_of(os.fsencode(blob))
    assert "\n" not in model["repo"]
    assert chat(besieged.models[model["name"]])


def test_a_path_of_2500_characters_is_served(besieged: Besieged) -> None:
    (path,) = besieged.folder.glob("longish/**/long.gguf")
    assert chat(besieged.models[besieged.model_of(os.fsencode(path))["name"]])


def test_a_path_too_deep_to_be_looked_at_is_reported(besieged: Besieged) -> None:
    """4,000 characters; and what is said of it stays readable."""
    problems = [p for p in besieged.found["problems"] if "/far/" in p["subject"]]
    (problem,) = problems
    assert "model_dirs" in problem["remedy"]
    assert len(str(problem)) < 1000


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_header_is_reported_and_not_served(besieged: Besieged, name: str) -> None:
    """What is wrong with it, and what to do; other than by name it appears nowhere."""
    file = f"bad-{name}.gguf"
    problem = besieged.problem_with(file)
    assert "header" in problem["reason"]
    assert problem["remedy"]
    assert len(problem["reason"]) < 300
    assert not [model for model in besieged.found["models"] if model["file"] == file]
    assert file in besieged.up.err


@pytest.mark.parametrize(
    ("subject", "reason", "remedy"),
    [
        ("outside-f16.gguf", "out of the cache", "model_dirs"),
        ("nowhere.gguf", "leads nowhere", "remove"),
        ("circle.gguf", "symbolic links", "remove"),
        ("zero.gguf", "not a regular file", "remove"),
        ("pipe.gguf", "not a regular file", "remove"),
        ("passwords.gguf", "not a GGUF file", "remove"),
        ("no-cache", "No such file", "cache_dirs"),
        ("no-models", "No such file", "model_dirs"),
    ],
)  # fmt: skip
def test_what_is_no_model_is_reported_with_a_remedy(
    besieged: Besieged, subject: str, reason: str, remedy: str
) -> None:
    problem = besieged.problem_with(subject)
    assert reason in problem["reason"]
    assert remedy in problem["remedy"]


def test_every_surface_shows_hostile_names_escaped(besieged: Besieged) -> None:
    """One line a model in each table, and nothing in a log that a terminal would obey."""
    at, count = besieged.at, len(besieged.found["models"])
    for shown in (at.ctl("models"), at.synapse("plan"), at.synapse("discover", "--dry-run")):
        _assert_plain(shown.text)
    assert len(at.ctl("models").out.strip().splitlines()) == count + 1
    for log in (at.log / "history.jsonl", at.log / "synapse.log", at.log / "supervisord.log"):
        _assert_plain(log.read_text("ascii"))


def test_links_to_hostile_paths_have_safe_names(besieged: Besieged) -> None:
    """var/models holds links and nothing else, and every path in a block passes the allow-list."""
    links = list((besieged.at.prefix / "var" / "models").iterdir())
    assert len(links) > 10
    for link in links:
        assert link.is_symlink()
        assert re.fullmatch(r"[a-z0-9._-]+\.gguf", link.name)


def test_discovery_amid_hostile_files_twice_changes_nothing(besieged: Besieged) -> None:
    at = besieged.at
    blocks, pids = at.blocks(), at.pids()
    changes = at.discover()["changes"]
    assert not changes["added"] + changes["changed"] + changes["removed"] + changes["kept"]
    assert (at.blocks(), at.pids()) == (blocks, pids)


# --- settings, templates, state, permissions -----------------------------------------------------


NAMES = {GOOD, "other-f16"}
BASE = "[model:other-f16]\nenabled = false"


@dataclass(frozen=True, slots=True)
class Steady:
    """A deployment with one model up and one disabled; it must be found as it was."""

    at: Deployment
    good: dict[str, Any]

    @property
    def settings(self) -> Path:
        return self.at.etc / "synapse.conf"

    @property
    def template(self) -> Path:
        return self.at.etc / "templates" / "program.conf.j2"

    def override(self, text: str | bytes) -> None:
        """Put a template in the place of the shipped one."""
        self.template.write_bytes(text if isinstance(text, bytes) else text.encode())
        self.template.chmod(0o600)

    def add(self) -> None:
        """A model that the next discovery would add."""
        file = write_model(self.at.sources / "late.gguf", seed=7)
        self.at.hub.add("added/late", {"late-f16.gguf": file})

    def processes(self) -> dict[str, psutil.Process]:
        """Each server that runs, as the system sees it."""
        return self.at.servers()

    def mend(self) -> None:
        """Take back what a test broke; nothing is applied."""
        self.template.unlink(missing_ok=True)
        shutil.rmtree(self.at.hub.repo("added/late"), ignore_errors=True)
        self.at.configure(BASE)


@pytest.fixture(scope="module")
def _steady(llama_server: Engine) -> Iterator[Steady]:
    with deployed(BASE) as deployment:
        own = deployment.sources
        deployment.hub.add("acme/good", {"good-f16.gguf": write_model(own / "good.gguf")})
        deployment.hub.add("acme/other", {"other-f16.gguf": write_model(own / "o.gguf", seed=1)})
        deployment.synapse("up", "--detach")
        yield Steady(deployment, deployment.model(GOOD))


@pytest.fixture
def steady(_steady: Steady) -> Iterator[Steady]:
    """For a test after which the same process must answer, and every block be the same."""
    blocks, processes = _steady.at.blocks(), _steady.processes()
    assert set(processes) == {GOOD}
    yield _steady
    _steady.mend()
    assert _steady.at.blocks() == blocks
    assert _steady.processes() == processes
    assert chat(_steady.good)
    _assert_nothing_injected(_steady.at, NAMES)


@pytest.fixture
def changing(_steady: Steady) -> Iterator[Steady]:
    """For a test that changes something on purpose."""
    yield _steady
    _steady.mend()
    _steady.at.synapse("discover", "--force", GOOD, "--force", "other-f16")
    _steady.at.wait_for({GOOD: "ready"})


FIVE_ERRORS = """
[synapse]
port_range = 1-2
host = example.com
max_parallel = 0
[probe]
period_secnds = 5
[model:good*]
context = lots
"""


def _refused(done: Done, *words: str) -> list[str]:
    """The lines of a refusal: status 2, nothing on stdout, and each word somewhere."""
    assert done.status == 2, done
    assert done.out == "", done
    _assert_plain(done.err)
    for word in words:
        assert word in done.err, done
    return done.err.strip().splitlines()


@pytest.mark.parametrize("command", [("discover", "--json"), ("up", "--detach")])
def test_five_errors_in_the_settings_are_five_lines(
    steady: Steady, command: tuple[str, ...]
) -> None:
    """All at once: the file, section, key and what is allowed."""
    steady.settings.write_text(FIVE_ERRORS)
    lines = _refused(steady.at.synapse(*command, expect=2), "1024-65535", "period_seconds")
    assert len(lines) == 5
    for line, place in zip(
        sorted(lines),
        ("[model:good*] context", "[probe] period_secnds", "[synapse] host",
         "[synapse] max_parallel", "[synapse] port_range"),
        strict=True,
    ):  # fmt: skip
        assert f"{steady.settings}: {place}: " in line


def test_a_broken_synapse_conf_keeps_nobody_from_stopping(llama_server: Engine) -> None:
    with deployed() as deployment:
        deployment.synapse("up", "--detach")
        (deployment.etc / "synapse.conf").write_text(FIVE_ERRORS)
        deployment.conf_d.chmod(0o777)
        assert deployment.down().status == 0
        assert deployment.processes() == []


@pytest.mark.parametrize(
    "content",
    [
        b"\x00\x01", b"[synapse\n", b"[synapse]\nhost = \xff\n", b"x" * 2_000_000,
        b"[DEFAULT]\nargs = --x\n[include]\nfiles = /etc/*.conf\n[program:evil]\n",
        b"[synapse]\nmax_parallel = " + b"9" * 5000,
        b"[synapse]\nengine = /bin/true\n  [program:evil]\n  command = /bin/true\n",
        b"[synapse]\nhost = 127.0.0.1\r0.0.0.0\n[model:*]\nalias = a\n  b\ndevice = x ;\n y\n",
    ],
    ids=lambda content: ascii(content[:40]),
)  # fmt: skip
def test_settings_that_are_no_settings_are_refused_by_name(steady: Steady, content: bytes) -> None:
    steady.settings.write_bytes(content)
    lines = _refused(steady.at.synapse("discover", expect=2), str(steady.settings))
    assert all(len(line) < 500 for line in lines)


@pytest.mark.parametrize(
    ("make", "remove"), [(os.mkfifo, os.unlink), (os.mkdir, os.rmdir)], ids=["pipe", "folder"]
)
def test_settings_that_are_no_file_are_refused_and_not_waited_for(
    steady: Steady, make: Callable[[Path, int], None], remove: Callable[[Path], None]
) -> None:
    steady.settings.unlink()
    make(steady.settings, 0o600)
    try:
        _refused(steady.at.synapse("discover", expect=2), str(steady.settings))
    finally:
        remove(steady.settings)


HOSTILE_ARGS = [
    "--x %(here)s", "--x %(ENV_HOME)s", "--x a;b", "--x 'a ;b'", "--x 'a #b'", "--x 'a\tb'",
    "--x 'unclosed", "--x \"quo'te\"", "--x back\\\\slash", "--x `id`", "--x $(id)", "--x a&b",
    "--x \N{LATIN SMALL LETTER E WITH ACUTE}", "--x a\u2028b", "--x (", "--x <y", "--x 'a\n  b'",
    "--host 0.0.0.0", "--port=1", "-m /etc/passwd", "--api-key secret", "--x " + "y" * 1001,
]  # fmt: skip


def test_hostile_args_are_refused_all_at_once(steady: Steady) -> None:
    """Each by file, section and key; a key that was given is not repeated."""
    sections = [f"[model:m{i}]\nargs = {args}" for i, args in enumerate(HOSTILE_ARGS)]
    steady.at.configure("\n".join(sections))
    lines = _refused(steady.at.synapse("discover", expect=2))
    for index in range(len(HOSTILE_ARGS)):
        place = f"{steady.settings}: [model:m{index}] args: "
        assert [place in line for line in lines].count(True) == 1, (HOSTILE_ARGS[index], lines)
    assert len(lines) == len(HOSTILE_ARGS)
    assert not [line for line in lines if "secret" in line]


ODD_ARGS = """--temp 1
  [program:evil]
  command=/bin/true
  --x 100% %% %s ; a comment
  '[a]' {b} * ^| '{"a":1}'
"""
ODD_WORDS = [
    "--temp", "1", "[program:evil]", "command=/bin/true", "--x", "100%", "%%", "%s",
    "[a]", "{b}", "*", "^|", '{"a":1}',
]  # fmt: skip


def test_odd_args_reach_supervisord_word_for_word(changing: Steady) -> None:
    """What looks like a section, an expansion or a shell's wildcard stays what it is: a word."""
    changing.at.configure(f"{BASE}\nargs = {ODD_ARGS}")
    assert changing.at.discover()["changes"]["changed"] == ["other-f16"]
    assert changing.at.programs()["other-f16"][-len(ODD_WORDS) :] == ODD_WORDS
    _assert_nothing_injected(changing.at, NAMES)


def _shipped() -> str:
    text = render.shipped("program.conf.j2")
    assert text is not None
    return text


TEMPLATES: dict[str, Callable[[str], str]] = {
    "undefined": lambda text: text + "{{ nonsense }}",
    "extra-program": lambda text: text + "\n[program:evil]\ncommand=/bin/true\n",
    "defaults": lambda text: "[DEFAULT]\nuser=nobody\n" + text,
    "carriage-return": lambda text: text + "\r[program:evil]\rcommand=/bin/true\r",
    "extra-key": lambda text: text + "user=nobody\n",
    "other-command": lambda text: text.replace("command={{ command }}", "command=/bin/true"),
    "expansion": lambda text: text.replace("priority={{ priority }}", "priority=%(here)s"),
    "dump": lambda _: "{{ ''.__class__.__mro__[1].__subclasses__() }}",
}


@pytest.mark.parametrize("broken", TEMPLATES)
def test_a_broken_template_is_named_and_what_runs_goes_on(steady: Steady, broken: str) -> None:
    """Whatever an override does wrong, the last good blocks stay, and no model is stopped."""
    steady.override(TEMPLATES[broken](_shipped()))
    done = steady.at.synapse("discover", expect=None)
    _assert_plain(done.text)
    assert re.search(r"program\.conf\.j2|good-f16", done.err), done
    assert max(map(len, done.err.splitlines())) < 1500


def test_a_template_that_is_no_text_is_named(steady: Steady) -> None:
    steady.override(b"\xff" + _shipped().encode())
    _refused(steady.at.synapse("discover", expect=2), "program.conf.j2")


def test_up_with_a_template_that_injects_ends_and_injects_nothing(llama_server: Engine) -> None:
    """Nobody waits for a model that has no block."""
    with deployed() as deployment:
        file = write_model(deployment.sources / "good.gguf")
        deployment.hub.add("acme/good", {"good-f16.gguf": file})
        deployment.synapse("init")
        template = deployment.etc / "templates" / "program.conf.j2"
        template.write_text(_shipped() + "\n[program:evil]\ncommand=/bin/true\n")
        template.chmod(0o600)
        done = deployment.synapse("up", "--detach", expect=None)
        assert "program.conf.j2" in done.err
        _assert_plain(done.text)
        _assert_nothing_injected(deployment, set())


NOT_STATE = {
    "empty": b"", "torn": b'{"entries":{"hf:acme/good',
    "deep": b'{"a":' * 100_000,
    "other-version": b'{"version":99}', "wrong-types": b'{"entries":7,"programs":{},"version":1}',
    "hostile": b'{"entries":{},"programs":[{"name":"../../evil"}],"version":1}',
}  # fmt: skip


@pytest.mark.parametrize("content", NOT_STATE)
def test_corrupt_state_is_rebuilt_and_costs_no_model_anything(steady: Steady, content: str) -> None:
    """Set aside, not written over; ports and blocks are what they were, and still ours."""
    lib = steady.at.lib
    for file in ("registry.json", "headers.json", "intent.json"):
        (lib / file).write_bytes(NOT_STATE[content])
    done = steady.at.synapse("discover", "--json")
    assert done.json()["changes"]["unchanged"] == sorted(NAMES)
    assert "Traceback" not in done.err
    assert (lib / "registry.json").exists()
    aside = lib / "registry.json.corrupt"
    assert aside.read_bytes() == NOT_STATE[content]
    aside.unlink()


def test_a_lost_registry_is_reported_and_blocks_stay_ours(steady: Steady) -> None:
    """After it was rebuilt a setting that changes is applied again, not kept from a block."""
    (steady.at.lib / "registry.json").write_bytes(b"{")
    steady.at.ctl("stop", "synapse")  # the listener reads it too, and must not be first
    try:
        found = steady.at.discover()
    finally:
        steady.at.ctl("start", "synapse")
    (problem,) = (p for p in found["problems"] if "registry.json" in p["subject"])
    assert "set aside" in problem["reason"]
    steady.at.configure(f"{BASE}\ncontext = 300")
    assert steady.at.discover("--dry-run")["changes"]["changed"] == ["other-f16"]
    (steady.at.lib / "registry.json.corrupt").unlink()
    steady.at.wait_for({GOOD: "ready"})


OPENED = [
    ".", "etc", "etc/conf.d", "etc/templates", "etc/supervisord.conf", "etc/synapse.conf",
    "etc/conf.d/good-f16.conf", "var", "var/lib", "var/models", "var/run",
]  # fmt: skip


def test_what_others_may_write_is_refused_by_path_all_at_once(steady: Steady) -> None:
    """With the command that mends each; and having run those, all is well."""
    paths = [steady.at.prefix / place for place in OPENED]
    modes = [path.stat().st_mode for path in paths]
    for path, mode in zip(paths, modes, strict=True):
        path.chmod(mode | 0o022)
    lines = _refused(steady.at.synapse("discover", expect=2))
    assert len(lines) == len(paths)
    for path in paths:
        assert [line for line in lines if line.endswith(f": chmod go-w {path}")], path
    for line in lines:
        steady.at.shell(line.rpartition(": ")[2])
    assert [path.stat().st_mode for path in paths] == modes
    steady.at.synapse("plan")


@pytest.mark.parametrize("command", [("init",), ("up", "--detach")])
def test_no_command_goes_on_in_a_world_writable_conf_d(
    steady: Steady, command: tuple[str, ...]
) -> None:
    steady.at.conf_d.chmod(0o777)
    try:
        _refused(steady.at.synapse(*command, expect=2), str(steady.at.conf_d))
    finally:
        steady.at.conf_d.chmod(0o700)


def test_a_block_that_is_a_link_to_what_others_may_write_is_refused(steady: Steady) -> None:
    target = steady.at.root / "theirs.conf"
    target.write_text("[program:evil]\ncommand=/bin/true\n")
    target.chmod(0o666)
    link = steady.at.conf_d / "theirs.conf"
    link.symlink_to(target)
    try:
        _refused(steady.at.synapse("discover", expect=2), str(link))
    finally:
        link.unlink()


@pytest.mark.parametrize("text", ["[program:x]\n", "\udcff"], ids=ascii)
def test_a_broken_block_of_the_users_is_named_and_changes_nothing(
    steady: Steady, text: str
) -> None:
    """With a change to make, and with none: supervisord would not start from this again."""
    broken = steady.at.conf_d / "mine.conf"
    broken.write_bytes(text.encode("utf-8", "surrogateescape"))
    broken.chmod(0o600)
    try:
        done = steady.at.synapse("discover", expect=None)
        assert done.status in (1, 2), done
        steady.add()
        done = steady.at.synapse("discover", expect=2)
        assert re.search(r"mine\.conf|program:x", done.err), done
        _assert_plain(done.text)
    finally:
        broken.unlink()


def test_what_an_apply_left_undone_is_made_up_for(changing: Steady) -> None:
    """supervisord lost a program (or never heard of it): the next discovery tells it."""
    at = changing.at
    at.ctl("stop", GOOD)
    at.ctl("remove", GOOD)
    at.synapse("discover")
    assert chat(at.wait_for({GOOD: "ready"})[GOOD])


# --- no room, no right ---------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [0, 4])
def test_where_no_file_may_grow_discovery_says_so_and_what_runs_goes_on(
    steady: Steady, blocks: int
) -> None:
    """As on a full disk; once there is room the same discovery succeeds."""
    steady.add()
    command = steady.at.command("discover")
    limited = ("/bin/sh", "-c", f'ulimit -f {blocks}; exec "$@"', "sh", *command)
    done = steady.at.run(*limited, expect=1)
    assert "File too large" in done.err
    assert "disk space" in done.err
    _assert_plain(done.text)
    assert not [path for path in steady.at.conf_d.iterdir() if "late" in path.name]


_ON_A_SMALL_DISK = """
set -e
mount -t tmpfs -o size=256k,mode=700 none "$1/p"
synapse() { "$2" --prefix "$1/p" "$3"; }
synapse "$1" "$2" init
synapse "$1" "$2" discover
head -c 1000000 /dev/zero > "$1/p/var/full" || true
mv "$1/late" "$1/hf/hub/models--acme--late"
echo "== full"
synapse "$1" "$2" discover || echo "status $?"
ls "$1/p/etc/conf.d"
rm "$1/p/etc/synapse.conf"
head -c 1000000 /dev/zero > "$1/p/var/fuller" || true
synapse "$1" "$2" init || echo "init $?"
ls "$1/p/etc"
rm "$1/p/var/full" "$1/p/var/fuller"
echo "== room"
synapse "$1" "$2" discover
ls "$1/p/etc/conf.d"
"""


def test_on_a_full_disk_nothing_is_half_written(llama_server: Engine) -> None:
    """A real one that is full in truth; the next discovery, with room, does what was left."""
    unshare = shutil.which("unshare")
    alone = (unshare or "unshare", "-rm", "/bin/sh", "-c")
    probe = [*alone, "mount -t tmpfs none /mnt"]
    if unshare is None or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("no namespace in which to mount a small file system")
    with deployed() as deployment:
        own = deployment.sources
        deployment.hub.add("acme/good", {"good-f16.gguf": write_model(own / "good.gguf")})
        deployment.hub.add("acme/late", {"late-f16.gguf": write_model(own / "late.gguf", seed=1)})
        deployment.hub.repo("acme/late").rename(deployment.root / "late")
        command = (str(deployment.root), deployment.command()[0])
        done = deployment.run(*alone, _ON_A_SMALL_DISK, "sh", *command)
        full, room = done.out.split("== full\n")[1].split("== room\n")
        assert full.splitlines() == [
            "+ late-f16", "status 1", "good-f16.conf", "init 2", "conf.d", "supervisord.conf",
            "templates",
        ], done  # fmt: skip
        assert room.splitlines() == ["+ late-f16", "good-f16.conf", "late-f16.conf"], done
        assert done.err.count("No space left on device") >= 2
        assert "disk space" in done.err
        _assert_plain(done.text)


def _without_privilege(deployment: Deployment, *arguments: str) -> Done:
    """Run our command line so that permissions bind it, also where the tests run as root."""
    command = deployment.command(*arguments)
    if os.geteuid() != 0:
        return deployment.run(*command, expect=None)
    if shutil.which("setpriv") is None:
        pytest.skip("root, whom no permission binds, and there is no setpriv")
    bound = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    return deployment.run(*bound, *command, expect=None)


@contextlib.contextmanager
def _mode(path: Path, mode: int) -> Iterator[None]:
    before = path.stat().st_mode
    path.chmod(mode)
    try:
        yield
    finally:
        path.chmod(before)


@pytest.mark.parametrize(
    "place",
    ["etc/conf.d", "var/lib", "var/models", "var/run", "etc/synapse.conf", "var/lib/registry.json",
     "etc/conf.d/good-f16.conf"],
)  # fmt: skip
def test_what_may_not_be_read_is_named_and_not_taken_for_absent(steady: Steady, place: str) -> None:
    path = steady.at.prefix / place
    with _mode(path, 0o000):
        done = _without_privilege(steady.at, "discover")
    assert done.status in (1, 2), done
    assert str(path) in done.err
    _assert_plain(done.text)


@pytest.mark.parametrize("place", ["etc/conf.d", "var/lib"])
def test_where_nothing_may_be_written_discovery_says_where(steady: Steady, place: str) -> None:
    steady.add()
    path = steady.at.prefix / place
    with _mode(path, 0o500):
        done = _without_privilege(steady.at, "discover")
    assert done.status == 1, done
    assert str(path) in done.err
    _assert_plain(done.text)


def test_a_cache_that_may_not_be_read_removes_nothing(steady: Steady) -> None:
    with _mode(steady.at.hub.root, 0o000):
        done = _without_privilege(steady.at, "discover")
    assert f"{steady.at.hub.root}: cannot look through this cache" in done.err
    assert "chmod" in done.err
    assert "edited by hand" not in done.err
    _assert_plain(done.text)


def test_an_unreadable_folder_costs_only_what_is_in_it(changing: Steady) -> None:
    """The folder is reported, and its model stays as it is; the others are served on."""
    at = changing.at
    pids = at.pids()
    with _mode(at.hub.repo("acme/other"), 0o000):
        done = _without_privilege(at, "discover", "--json")
        problems = done.json()["problems"]
    folder = next(problem for problem in problems if "acme--other" in problem["subject"])
    assert "chmod" in folder["remedy"]
    assert done.json()["changes"]["removed"] == []
    assert at.pids() == pids


# --- two at once, and where a prefix may lie -----------------------------------------------------


def test_two_ups_at_once_make_one_supervisord(llama_server: Engine) -> None:
    """The one that comes too late shows the same models, or says in a line why it cannot."""
    with deployed() as deployment:
        file = write_model(deployment.sources / "good.gguf")
        deployment.hub.add("acme/good", {"good-f16.gguf": file})
        racing = [
            subprocess.Popen(
                deployment.command("up", "--detach"), env=deployment.environment(),
                cwd=deployment.root, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True,
            )
            for _ in range(2)
        ]  # fmt: skip
        said = [process.communicate(timeout=60) for process in racing]
        statuses = [process.returncode for process in racing]
        assert 0 in statuses, said
        for status, (out, err) in zip(statuses, said, strict=True):
            assert status == 0 or "another discovery is running" in err, (status, out, err)
            _assert_plain(out + err)
        supervisords = [p for p in deployment.processes() if _is_supervisord(p)]
        assert len(supervisords) == 1
        assert chat(deployment.wait_ready()[GOOD])


def _is_supervisord(process: psutil.Process) -> bool:
    try:
        return "supervisor.supervisord" in process.cmdline()
    except psutil.NoSuchProcess:
        return False


def _moved(deployment: Deployment, name: str) -> None:
    """The deployment at a prefix of another name, with nothing in it yet."""
    shutil.rmtree(deployment.prefix, ignore_errors=True)
    deployment.prefix = deployment.root / name
    deployment.etc = deployment.prefix / "etc"
    deployment.conf_d = deployment.etc / "conf.d"
    deployment.log = deployment.prefix / "var" / "log"
    deployment.lib = deployment.prefix / "var" / "lib"


def test_a_prefix_with_blanks_and_signs_serves(llama_server: Engine) -> None:
    with deployed() as deployment:
        _moved(deployment, " -x with blanks, a=b:c@d+e")
        file = write_model(deployment.sources / "good.gguf")
        deployment.hub.add("acme/good", {"good-f16.gguf": file})
        _add_repo(deployment, "acme/\n", write_model(deployment.sources / "x.gguf", seed=1))
        deployment.synapse("init")
        deployment.configure()
        deployment.synapse("up", "--detach")
        models = deployment.models()
        assert len(models) == 2
        assert all(chat(model) for model in models.values())
        _assert_nothing_injected(deployment, set(models))
        deployment.synapse("discover")


BAD_PREFIXES = {
    "na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve": "ASCII", "new\nline": "ASCII",
    "semi ;colon": "ASCII", "%(here)s": "ASCII", "quo'te": "ASCII", "a  b": "ASCII",
    "end ": "ASCII", "\udcff": "ASCII", "x" * 100: "unix socket", "y/" * 60: "unix socket",
}  # fmt: skip


def test_a_prefix_that_cannot_be_is_refused_before_anything_is_written() -> None:
    """Naming it, escaped; the longest that fits a unix socket is said."""
    with deployed() as deployment:
        for name, why in BAD_PREFIXES.items():
            _moved(deployment, name)
            _refused(deployment.synapse("init", expect=2), why, "--prefix")
        _refused(deployment.synapse("up", "--detach", expect=2), "unix socket", "--prefix")
        assert {path.name for path in deployment.root.iterdir()} <= {"hf", "src"}


def test_a_prefix_that_is_a_file_or_lies_in_one_is_refused() -> None:
    with deployed() as deployment:
        _moved(deployment, "file")
        deployment.prefix.write_text("mine")
        _refused(deployment.synapse("init", expect=2), "--prefix")
        deployment.prefix = deployment.prefix / "below"
        _refused(deployment.synapse("up", "--detach", expect=2), "--prefix")
        assert (deployment.root / "file").read_text() == "mine"


def test_up_with_a_broken_main_file_ends_and_says_why(llama_server: Engine) -> None:
    """The line that supervisord calls its error; and nobody waits for what cannot come."""
    with deployed() as deployment:
        file = write_model(deployment.sources / "good.gguf")
        deployment.hub.add("acme/good", {"good-f16.gguf": file})
        deployment.synapse("init")
        deployment.synapse("discover")
        main_file = deployment.etc / "supervisord.conf"
        whole = main_file.read_text()
        main_file.write_text(whole + "\n[program:x]\n")
        _refused(deployment.synapse("up", "--detach", expect=2), "program:x")
        main_file.write_text(whole.replace("[include]\nfiles=conf.d/*.conf", ""))
        done = deployment.synapse("up", "--detach", expect=1)
        assert "[include]" in done.err
        assert str(main_file) in done.err
        _assert_plain(done.err)


def test_down_finds_a_supervisord_that_never_got_its_socket(llama_server: Engine) -> None:
    """It answers nothing and wrote no pid file; an editor that has the main file open is let be."""
    with deployed() as deployment:
        deployment.synapse("init")
        main_file = str(deployment.etc / "supervisord.conf")
        (deployment.prefix / "var" / "run" / "supervisor.sock").mkdir()
        stuck = _start(deployment, str(BIN / "supervisord"), "-n", "-c", main_file)
        editor = _start(deployment, "/bin/sh", "-c", "read line", "sh", main_file)
        try:
            assert "nothing is running" not in deployment.down().err
            assert stuck.wait(10) is not None
            assert editor.poll() is None
        finally:
            for process in (stuck, editor):
                process.kill()
                process.communicate()


def _start(deployment: Deployment, *command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, env=deployment.environment(), cwd=deployment.root, stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def test_closed_outputs_are_no_error_and_results_stay_apart(steady: Steady) -> None:
    command = " ".join(steady.at.command("discover", "--dry-run", "--json"))
    assert steady.at.shell(f"{command} 2>&-").json()["dry_run"] is True
    assert steady.at.shell(f"{command} >&-").text == ""


def test_a_default_cache_that_does_not_exist_is_named() -> None:
    with deployed() as deployment:
        deployment.synapse("init")
        shutil.rmtree(deployment.hub.root)
        done = deployment.synapse("discover")
        assert str(deployment.hub.root) in done.err
        assert "cache_dirs" in done.err
