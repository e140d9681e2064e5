"""Programs become blocks that supervisord reads as exactly what was meant, or are refused.

What a block should be read as is written down here, from the contract: which keys it has, which
characters may stand in it, and how its command line is put together.
"""

from __future__ import annotations

import random
import re
import shlex
import socket
import string
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from supervisor.options import ServerOptions, UnhosedConfigParser

from supervisor_synapse import render
from supervisor_synapse.adapters import config_files
from supervisor_synapse.core.catalog import RESERVED_NAMES, build_catalog
from supervisor_synapse.core.gateway import GatewayPaths, Upstream
from supervisor_synapse.core.model import Program, Role, Tier
from supervisor_synapse.core.plan import make_plan
from supervisor_synapse.core.settings import Enable, GatewaySettings, Settings, StopPolicy
from supervisor_synapse.errors import ConfigError
from tests.unit.builders import file, program, world

KEYS = {
    "command", "directory", "environment", "priority", "autostart", "autorestart", "startsecs",
    "startretries", "exitcodes", "stopsignal", "stopwaitsecs", "stopasgroup", "killasgroup",
    "redirect_stderr", "stdout_logfile", "stdout_logfile_maxbytes", "stdout_logfile_backups",
}  # fmt: skip
LAUNCHER = ("/opt/My Tools/synapse-run",)
ENGINE = "/opt/llama/llama-server"
RUN_FOLDER = "/run/our models"
PATH = frozenset(string.ascii_letters + string.digits + "_@+=:,./-")  # may stand anywhere
FORBIDDEN = frozenset("\n\r\t\0;#'\\()`$&<>!?~")  # must stand nowhere

TEMPLATES = render.Templates()


@pytest.fixture(scope="module")
def around(tmp_path_factory: pytest.TempPathFactory) -> render.Surroundings:
    """A deployment whose folders exist, as supervisord's parser wants."""
    return surroundings(tmp_path_factory.mktemp("prefix"))


def surroundings(folder: Path, **changes: Any) -> render.Surroundings:
    values: dict[str, Any] = {
        "launcher": LAUNCHER, "engine": ENGINE, "stop": StopPolicy(30, 2),
        "directory": str(folder), "log_folder": str(folder), "run_folder": RUN_FOLDER,
    }  # fmt: skip
    return render.Surroundings(**(values | changes))


class Supervisord:
    """supervisord's own way from the text of an included file to the programs that it would run."""

    def __init__(self, folder: str) -> None:
        self._options = ServerOptions()
        self._options.here = folder

    def read(self, text: str) -> tuple[dict[str, set[str]], Any]:
        """Section → keys; and the only program."""
        parser = UnhosedConfigParser()
        parser.expansions = self._options.environ_expansions
        parser.read_string(text)
        parser.expand_here(self._options.here)
        assert not parser.defaults()
        sections = {name: set(parser.options(name)) for name in parser.sections()}
        ((process,),) = (
            group.process_configs for group in self._options.process_groups_from_parser(parser)
        )
        return sections, process


def command_of(meant: Program) -> list[str]:
    """The launcher and its bounds, then the engine with the files and the arguments."""
    projector = ["--mmproj", meant.projector_path] if meant.projector_path is not None else []
    return [
        *LAUNCHER, "--drain", "30", "--term", "2", "--record", f"{RUN_FOLDER}/{meant.name}.run",
        "--ledger", f"{RUN_FOLDER}/ledger.json",
        "--", ENGINE, "--model", meant.model_path, *projector, *meant.arguments,
    ]  # fmt: skip


def assert_exactly(meant: Program, block: render.Block, around: render.Surroundings) -> None:
    """The text holds this program, and nothing else that supervisord would read."""
    sections, process = Supervisord(around.directory).read(block.text)
    assert sections == {f"program:{meant.name}": KEYS}
    assert process.name == meant.name
    assert shlex.split(process.command) == command_of(meant)
    assert process.environment == {"GGML_NO_BACKTRACE": "1"}
    assert process.directory == around.directory
    assert process.stdout_logfile == f"{around.log_folder}/{meant.name}.log"
    assert (process.autostart, bool(process.autorestart)) == (False, False)
    assert (process.stopasgroup, process.killasgroup) == (False, True)
    assert block.command == tuple(command_of(meant))
    assert_clean(block.text)


@pytest.mark.parametrize(
    ("parameters", "size_bytes", "said"),
    [
        (1_543_714_304, 986 * 2**20, "1.54B parameters, 986 MiB on disk"),
        (268_098_176, 242 * 2**20, "268M parameters, 242 MiB on disk"),
        (34_816, 70_000, "35K parameters, 68 KiB on disk"),
        (70_553_706_496, 40 * 2**30, "70.55B parameters, 40.0 GiB on disk"),
    ],
)
def test_a_block_begins_with_the_size_of_its_model_in_fitting_units(
    around: render.Surroundings, parameters: int, size_bytes: int, said: str
) -> None:
    meant = program(parameters=parameters, size_bytes=size_bytes)
    text = render.render_program(TEMPLATES, meant, around).text
    assert text.split("\n")[0] == f"; {meant.name}: text, FAST, {said}"


# Every line of a block: a comment of ours, the section, or one of the keys.
_LINE = re.compile(
    r"; [ -~]*|\[program:[a-z0-9][a-z0-9._-]{0,62}\]|(?:" + "|".join(sorted(KEYS)) + r")=[ -~]*"
)
_COMMENT = re.compile(
    r"; [a-z0-9._-]+: [a-z]+, [A-Z]+, (\d+|\d+[MK]|\d+\.\d\dB) parameters, "
    r"(\d+ [KM]iB|\d+\.\d GiB) on disk"
    r"|; Written by `synapse discover`\. You may edit it: then run `supervisorctl update`\. "
    r"An edited block"
    r"|; is kept; discovery writes its own version beside it\."
    r"|; The event listener decides when a model starts; supervisord spawns, signals and reaps\."
    r"|; synapse-run drains on TERM; after this long supervisord kills the whole group\."
)


def assert_clean(text: str) -> None:
    """Nothing but lines of the known kinds, of printable ASCII, without a way to expand or end."""
    assert text.endswith("\n")
    for line in text.removesuffix("\n").split("\n"):
        assert _LINE.fullmatch(line), line
        if line.startswith(";"):
            assert _COMMENT.fullmatch(line), line
        else:
            assert ";" not in line, line
            assert "#" not in line, line
            assert "%" not in line.replace("%%", ""), line
            assert "(" not in line, line


def assert_refused(meant: Program, around: render.Surroundings) -> None:
    """Refused in one printable line of bounded length."""
    with pytest.raises(ConfigError) as caught:
        render.render_program(TEMPLATES, meant, around)
    (line,) = caught.value.problems
    assert line.isascii()
    assert line.isprintable()
    assert len(line) < 1500


# --- what is rendered ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"projector_path": "/models/mmproj.gguf"}, {"model_path": "/m/a b c.gguf"},
        {"name": "a"}, {"name": "0"}, {"name": "a" * 63}, {"name": "a..b"}, {"name": "a.conf"},
        {"arguments": ("--alias", "Qwen/Qwen2.5:7b", "--host", "::1", "--port", "8100")},
        {"arguments": ("--flash-attn", "on", "--json-schema", '{"a":[1,"*"]}', "-ot", "^x|y=CPU")},
        {"arguments": ("--top-p", "50%", "%%", "%s", "100%d", "%")},
        {"arguments": ("", " ", " a  b ", "--")}, {"arguments": ("-" * 1000,)}, {"arguments": ()},
        {"model_path": "/" + "a" * 999}, {"role": Role.RERANKER, "tier": Tier.POWERFUL},
        {"parameters": 2**63, "size_bytes": 2**60}, {"parameters": 0, "size_bytes": 0},
    ],
    ids=repr,
)  # fmt: skip
def test_supervisord_reads_a_block_as_exactly_the_program_meant(
    around: render.Surroundings, changes: dict[str, Any]
) -> None:
    meant = program(**changes)
    assert_exactly(meant, render.render_program(TEMPLATES, meant, around), around)


def test_supervisord_gives_a_stop_all_the_time_that_it_may_take(tmp_path: Path) -> None:
    """Drain, TERM and a second TERM; supervisord must not kill before that."""
    around = surroundings(tmp_path, stop=StopPolicy(drain_seconds=3600, term_seconds=10))
    block = render.render_program(TEMPLATES, program(), around)
    _, process = Supervisord(around.directory).read(block.text)
    assert process.stopwaitsecs > 3600 + 10 + 10
    assert shlex.split(process.command)[1:5] == ["--drain", "3600", "--term", "10"]


def test_supervisord_neither_starts_nor_restarts_by_itself(around: render.Surroundings) -> None:
    block = render.render_program(TEMPLATES, program(), around)
    _, process = Supervisord(around.directory).read(block.text)
    assert (process.startsecs, process.startretries) == (0, 0)
    assert (process.autostart, bool(process.autorestart)) == (False, False)
    assert process.redirect_stderr is True


def test_programs_keep_the_order_of_their_priorities_behind_the_listener(tmp_path: Path) -> None:
    around = surroundings(tmp_path)
    priorities = []
    for priority in (0, 10, 20, 1000):
        block = render.render_program(TEMPLATES, program(priority=priority), around)
        priorities.append(Supervisord(str(tmp_path)).read(block.text)[1].priority)
    assert priorities == sorted(set(priorities))
    assert priorities[0] > -1


def test_a_block_leaves_the_library_path_as_supervisord_has_it(tmp_path: Path) -> None:
    """A value in the block would replace it, and with it the way to the drivers of a device."""
    block = render.render_program(TEMPLATES, program(), surroundings(tmp_path))
    _, process = Supervisord(str(tmp_path)).read(block.text)
    assert process.environment == {"GGML_NO_BACKTRACE": "1"}
    assert block.environment == process.environment


def test_the_check_of_a_rendered_block_agrees(around: render.Surroundings) -> None:
    block = render.render_program(TEMPLATES, program(), around)
    config_files.check_block(block, render.BLOCK_KEYS)
    assert render.BLOCK_KEYS == KEYS


# --- what is refused -----------------------------------------------------------------------------

HOSTILE = [
    "\n", "\r", "\r\n", "\n[program:x]\ncommand=/bin/sh\n", "\r[inet_http_server]\rport=*:9001\r",
    "]", "]\n", "%(here)s", "%%(here)s", "%(ENV_HOME)s", "%(", " ;", ";", " #", "#", "'", "''",
    "\\", "\\n", "`id`", "$(id)", "${HOME}", "&", "<", ">", "!", "?", "~", "\0", "\t", "\v", "\f",
    "\x1b[31m", "\x7f", "\x85", "\xa0", "é", "\u0130", "\u2028", "\u2029", "\ufeff", "\u202e",
    "\u3000", "\uff1b", "\udcff", "\ud800", "\U0001f600", "\u212b", "\u017f", "\u212a",
]  # fmt: skip


@pytest.mark.parametrize("bad", HOSTILE, ids=ascii)
@pytest.mark.parametrize("place", ["before", "within", "after"])
def test_no_hostile_text_passes_in_any_value(
    around: render.Surroundings, bad: str, place: str
) -> None:
    """Each value of a program, and each of its surroundings."""
    text = {"before": bad + "ab", "within": "a" + bad + "b", "after": "ab" + bad}[place]
    assert_refused(program(name=text), around)
    if bad != "]":  # harmless in a command, and some arguments need it
        assert_refused(program(model_path="/m/" + text), around)
        assert_refused(program(projector_path="/m/" + text), around)
        assert_refused(program(arguments=("--x", text)), around)
    assert not render.is_safe_path("/m/" + text)
    folder = Path(around.directory)
    for change in ("directory", "log_folder", "run_folder"):
        assert_refused(program(), surroundings(folder, **{change: f"/m/{text}"}))
    assert_refused(program(), surroundings(folder, engine=f"/m/{text}"))


@pytest.mark.parametrize("name", sorted(RESERVED_NAMES | {"all", "discover", "gateway", "synapse"}))
def test_a_reserved_name_is_refused(around: render.Surroundings, name: str) -> None:
    """`all` is a word of supervisorctl; a second [program:discover] would replace ours."""
    assert_refused(program(name=name), around)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "-a", ".a", "_a", "A", "a b", "a/b", "a:b", "a*", "a" * 64, "a" * 4000]
)
def test_what_is_no_program_name_is_refused(around: render.Surroundings, name: str) -> None:
    assert_refused(program(name=name), around)


@pytest.mark.parametrize(
    ("path", "safe"),
    [
        ("/a", True), ("/", True), ("/a b/c.gguf", True), ("/a@b_c+d=e:f,g.h-i", True),
        ("/a/...b/..c/d..", True), ("/a/../b", False), ("/..", False), ("/a/..", False),
        ("a/b", False), ("", False), (" /a", False), ("/a ", False), ("/a  b", False),
        ("/a%b", False), ("/a*", False), ('/a"b', False), ("/" + "a" * 999, True),
        ("/" + "a" * 1000, False), ("/" + "a" * 4000, False), ("/a[b]", False),
    ],
)  # fmt: skip
def test_a_path_is_safe_where_supervisord_passes_it_on(path: str, safe: bool) -> None:
    """Anything else is reached through a link with a safe name."""
    assert render.is_safe_path(path) is safe


# --- ten thousand names and paths ----------------------------------------------------------------

_FUZZED = 10_000
_PIECES = [*HOSTILE, "..", "/", "//", "/../", ".", "-", "--", " ", "  ", '"', "*", "[", "{", "}",
           "|", "^", "%", "%%", "=", ":", ",", "@", "+", "_", "all", "synapse", "discover",
           "[program:x]", "command=", "a" * 70, "x" * 1000, "y" * 4000]  # fmt: skip
_PLAIN = string.ascii_letters + string.digits + "._-"


def _hostile_text(chance: random.Random) -> str:
    """Plain text with, mostly, one to three hostile pieces in it; at times of 4,000 characters."""
    text = "".join(chance.choices(_PLAIN, k=chance.randint(0, 20)))
    for _ in range(chance.choice([0, 1, 1, 1, 2, 3])):
        piece = chance.choice(_PIECES[:-3] if chance.random() < 0.95 else _PIECES[-3:])
        at = chance.randint(0, len(text))
        text = text[:at] + piece + text[at:]
    if chance.random() < 0.2:
        text += "".join(chr(chance.randrange(0x110000)) for _ in range(chance.randint(1, 3)))
    return text.lower() if chance.random() < 0.3 else text


def _in_name(text: str) -> Program:
    return program(name=text)


def _in_path(text: str) -> Program:
    return program(model_path=f"/models/{text}.gguf")


def _in_projector(text: str) -> Program:
    return program(projector_path=f"/models/{text}/mmproj.gguf")


def _in_argument(text: str) -> Program:
    return program(arguments=("--port", "8100", "--alias", text))


def _through_a_link(text: str) -> Program:
    """As discovery does: a path that is not safe is reached under a safe name."""
    path = f"/models/{text}.gguf"
    return program(model_path=path if render.is_safe_path(path) else "/prefix/var/models/a.gguf")


def _must_pass(fuzzed: str, where: object) -> bool:
    """What every deployment needs to be rendered."""
    if where is _in_name:
        return bool(re.fullmatch("[a-z0-9][a-z0-9._-]{0,62}", fuzzed)) and (
            fuzzed not in RESERVED_NAMES
        )
    return where is _through_a_link or (set(fuzzed) <= PATH and len(fuzzed) < 900)


def _must_not_pass(fuzzed: str, where: object) -> bool:
    if where is _in_name:
        return not _must_pass(fuzzed, where)
    unprintable = not (fuzzed.isascii() and (fuzzed.isprintable() or not fuzzed))
    too_long = len(fuzzed) > 1000
    return where is not _through_a_link and (
        unprintable or too_long or not FORBIDDEN.isdisjoint(fuzzed)
    )


def test_ten_thousand_hostile_names_and_paths_are_rendered_exactly_or_refused(
    around: render.Surroundings,
) -> None:
    """Each is read back by supervisord as what was meant, or refused in a printable line."""
    chance = random.Random(20251)
    places: list[Callable[[str], Program]] = [
        _in_name, _in_path, _in_projector, _in_argument, _through_a_link,
    ]  # fmt: skip
    started = time.monotonic()
    outcomes = {(place.__name__, passed): 0 for place in places for passed in (True, False)}
    for number in range(_FUZZED):
        place = places[number % len(places)]
        fuzzed = _hostile_text(chance)
        meant = place(fuzzed)
        try:
            block = render.render_program(TEMPLATES, meant, around)
        except ConfigError:
            assert not _must_pass(fuzzed, place), (place, fuzzed)
            if number % 50 == 0:
                assert_refused(meant, around)
            outcomes[place.__name__, False] += 1
        else:
            assert not _must_not_pass(fuzzed, place), (place, fuzzed)
            assert_exactly(meant, block, around)
            outcomes[place.__name__, True] += 1
    assert time.monotonic() - started < 60
    del outcomes["_through_a_link", False]  # what discovery renders always passes
    assert min(outcomes.values()) > 50, outcomes
    assert sum(outcomes.values()) == _FUZZED


_TEXT = st.text(st.characters(exclude_categories=()), max_size=40) | st.sampled_from(HOSTILE)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(words=st.lists(_TEXT | st.text(sorted(PATH) + list(' %"*[]{}|^'), max_size=12), max_size=4))
def test_any_command_is_read_back_word_by_word_or_refused(
    around: render.Surroundings, words: list[str]
) -> None:
    meant = program(arguments=tuple(words))
    try:
        block = render.render_program(TEMPLATES, meant, around)
    except ConfigError:
        assert not set("".join(words)) <= PATH
    else:
        assert_exactly(meant, block, around)


def test_whatever_its_file_is_called_a_model_is_rendered(around: render.Surroundings) -> None:
    """From 600 hostile repo and file names over catalog and plan to blocks with plain names."""
    chance = random.Random(20252)
    files = [
        file(repo=f"{_hostile_text(chance)}/{_hostile_text(chance)}" if number % 2 else None,
             file=f"{_hostile_text(chance)}-{number}.gguf", inode=number + 1)
        for number in range(600)
    ]  # fmt: skip
    models = build_catalog(files, {}).models
    wide = Settings(first_port=10000, last_port=19999, enable=Enable.ALL)
    plan = make_plan(models, wide, world())
    assert len(plan.programs) == 600
    for one in plan.programs:
        safe = render.is_safe_path(one.model_path)
        meant = replace(one, model_path=one.model_path if safe else f"/links/{one.name}.gguf")
        block = render.render_program(TEMPLATES, meant, around)
        assert_exactly(meant, block, around)
    names = [one.name for one in plan.programs]
    assert len(set(names)) == 600


# --- supervisord's whole configuration -----------------------------------------------------------


@pytest.fixture
def main_config(tmp_path: Path) -> Path:
    """A deployment's main file, with the folders that it names."""
    for folder in ("etc/conf.d", "var/run", "var/log", "candidates"):
        (tmp_path / folder).mkdir(parents=True)
    main = tmp_path / "etc" / "supervisord.conf"
    text = render.render_main(
        TEMPLATES, str(tmp_path), ("/opt/My Bin/synapse",), f"{tmp_path}/var/run/supervisor.sock"
    )
    main.write_text(text)
    return main


def read_main(main: Path) -> Any:
    options = ServerOptions()
    options.configfile, options.here = str(main), str(main.parent)
    return options.read_config(str(main))


def test_supervisord_reads_the_main_file_as_meant(main_config: Path, tmp_path: Path) -> None:
    root = read_main(main_config)
    found = {group.name: group.process_configs[0] for group in root.process_group_configs}
    assert set(found) == {"synapse", "discover"}
    begin = ["/opt/My Bin/synapse", "--prefix", str(tmp_path)]
    assert shlex.split(found["synapse"].command) == [*begin, "listen"]
    assert shlex.split(found["discover"].command) == [*begin, "discover"]
    assert root.umask == 0o077
    assert [server["family"] for server in root.server_configs] == [socket.AF_UNIX]
    assert root.server_configs[0]["chmod"] == 0o700
    assert {name for name, _, _ in root.rpcinterface_factories} == {"supervisor", "synapse"}


def test_the_main_file_holds_the_listener_apart_and_ends_it_last(main_config: Path) -> None:
    """Its own lowest priority; a buffer that holds the events of a start; no stray stdout."""
    root = read_main(main_config)
    groups = {group.name: group for group in root.process_group_configs}
    listener = groups["synapse"]
    assert listener.priority < min(g.priority for n, g in groups.items() if n != "synapse")
    assert listener.buffer_size >= 2000
    assert listener.process_configs[0].redirect_stderr is False


@pytest.mark.parametrize("bad", HOSTILE, ids=ascii)
def test_no_hostile_prefix_or_command_gets_into_the_main_file(bad: str) -> None:
    for prefix, synapse, place in (
        (f"/a{bad}b", "/b/synapse", "/s"), ("/a", "/b/synapse", f"/s{bad}"),
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            render.render_main(TEMPLATES, prefix, (synapse,), place)
    if bad != "]":
        with pytest.raises(ConfigError):
            render.render_main(TEMPLATES, "/a", (f"/b{bad}/synapse",), "/s")


def test_many_blocks_together_are_read_as_those_programs(main_config: Path, tmp_path: Path) -> None:
    """As they are activated: all at once, through [include]."""
    around = surroundings(tmp_path)
    meant = [program(name=f"m-{n}", arguments=("--alias", f"a % {n}")) for n in range(100)]
    blocks = [render.render_program(TEMPLATES, one, around) for one in meant]
    for block in blocks:
        (tmp_path / "candidates" / f"{block.name}.conf").write_text(block.text)
    config_files.parse_back(main_config, tmp_path / "candidates", blocks)
    for block in blocks:
        (main_config.parent / "conf.d" / f"{block.name}.conf").write_text(block.text)
    groups = read_main(main_config).process_group_configs
    assert {g.name for g in groups} == {"synapse", "discover", *(one.name for one in meant)}


# --- templates -----------------------------------------------------------------------------------


def overridden(tmp_path: Path, content: str | bytes) -> render.Templates:
    """The templates of a deployment that has its own for programs."""
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "program.conf.j2").write_bytes(data)
    return render.Templates(tmp_path)


def test_a_template_of_the_user_wins(around: render.Surroundings, tmp_path: Path) -> None:
    shipped = render.shipped("program.conf.j2")
    assert shipped is not None
    own = shipped.replace("stdout_logfile_backups=2", "stdout_logfile_backups=7")
    block = render.render_program(overridden(tmp_path, own), program(), around)
    _, process = Supervisord(around.directory).read(block.text)
    assert process.stdout_logfile_backups == 7


def test_without_one_of_the_user_the_shipped_template_is_taken(
    around: render.Surroundings, tmp_path: Path
) -> None:
    block = render.render_program(render.Templates(tmp_path / "none"), program(), around)
    assert block == render.render_program(TEMPLATES, program(), around)


@pytest.mark.parametrize(
    "template",
    [
        "{{ no_such_value }}", "{{ name.no.such }}", "{% if %}", "{{ name", "{% include 'none' %}",
        "{% include 'program.conf.j2' %}", "{{ 1 // 0 }}", "{{ name + 1 }}", "{{ name | nope }}",
        "{{ priority | xmlattr }}", "{{ [] | first }}{{ nope }}", b"\xff\xfe",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ '%d' % name }}",
    ],
    ids=repr,
)  # fmt: skip
def test_a_broken_template_is_an_error_that_names_it(
    around: render.Surroundings, tmp_path: Path, template: str | bytes
) -> None:
    with pytest.raises(ConfigError, match=r"program\.conf\.j2"):
        render.render_program(overridden(tmp_path, template), program(), around)


def test_a_syntax_error_in_a_template_names_its_line(
    around: render.Surroundings, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="line 3"):
        render.render_program(overridden(tmp_path, "a\n\n{% nope %}\n"), program(), around)


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("priority={{ priority }}\n", "", "priority"),
        ("priority={{ priority }}\n", "priority=1\numask=000\n", "umask"),
        ("[program:{{ name }}]", "[program:other]", "program:other"),
        ("priority={{ priority }}", "priority=1\n[inet_http_server]\nport=*:9001", "inet_http"),
        ("priority={{ priority }}", "priority=1\n[DEFAULT]\numask=000", "DEFAULT|umask|sections"),
        ("[program:{{ name }}]", "no section", "parse"),
    ],
)  # fmt: skip
def test_a_template_that_makes_anything_else_is_caught_when_it_is_read_back(
    around: render.Surroundings, tmp_path: Path, old: str, new: str, names: str
) -> None:
    """Exactly one section and exactly our keys, whatever a template says."""
    shipped = render.shipped("program.conf.j2")
    assert shipped is not None
    assert old in shipped
    own = overridden(tmp_path, shipped.replace(old, new))
    block = render.render_program(own, program(), around)
    with pytest.raises(ConfigError, match=names):
        config_files.check_block(block, render.BLOCK_KEYS)


def test_a_template_that_changes_what_is_run_is_caught_when_it_is_read_back(
    main_config: Path, tmp_path: Path
) -> None:
    shipped = render.shipped("program.conf.j2")
    assert shipped is not None
    for old, new in (
        ("command={{ command }}", "command=/bin/sh {{ command }}"),
        ("autostart=false", "autostart=true"),
        ("killasgroup=true", "killasgroup=false"),
        ("environment={{ environment }}", "environment=LD_PRELOAD=/x"),
    ):
        assert old in shipped
        own = overridden(tmp_path, shipped.replace(old, new))
        block = render.render_program(own, program(), surroundings(tmp_path))
        (tmp_path / "candidates" / f"{block.name}.conf").write_text(block.text)
        with pytest.raises(ConfigError, match=old.partition("=")[0]):
            config_files.parse_back(main_config, tmp_path / "candidates", [block])


# --- the gateway ---------------------------------------------------------------------------------

PATHS = GatewayPaths(
    "/run/our models/gateway.sock", "/run/again.sock", "/run/supervisor.sock", "/lib/routes.map",
    "/lib/models.map", "/lib/gateway.lua",
)  # fmt: skip


def gateway(upstreams: list[Upstream] | None = None, paths: GatewayPaths = PATHS,
            **settings: Any) -> str:  # fmt: skip
    """HAProxy's configuration, by our own templates."""
    found = [Upstream("a", "127.0.0.1", 8100)] if upstreams is None else upstreams
    return render.render_gateway(TEMPLATES, GatewaySettings(**settings), found, paths)


def keywords(config: str) -> list[str]:
    """The first word of each line that says something."""
    return [line.split()[0] for line in config.splitlines() if line.split("#")[0].strip()]


def test_the_gateway_has_one_backend_for_each_model_in_its_order() -> None:
    config = gateway([Upstream("b.c-d_e", "127.0.0.1", 8101), Upstream("a", "::1", 8100)])
    assert re.findall(r"^backend (.+)$", config, re.MULTILINE) == ["b.c-d_e", "a"]
    assert re.findall(r"^    server model (\S+)", config, re.MULTILINE) == [
        "127.0.0.1:8101", "[::1]:8100",
    ]  # fmt: skip
    assert "stats socket /run/our\\ models/gateway.sock mode 600" in config


def test_what_is_not_wanted_is_not_said() -> None:
    plain, full = gateway(), gateway(
        host="::1", port=8443, tls_certificate="/etc/my keys/a.pem", api_key_file="/etc/keys"
    )  # fmt: skip
    assert " ssl " not in plain
    assert "401" not in plain
    assert "    bind [::1]:8443 ssl crt /etc/my\\ keys/a.pem\n" in full
    assert "-f /etc/keys }" in full


@pytest.mark.parametrize(
    "name",
    ["", "a b", "a\nglobal", "a\r", "../x", "A", "-x", "a{b}", "a#b", "a;b", "ä", "x" * 64,
     *sorted(RESERVED_NAMES)],
)  # fmt: skip
def test_a_name_that_is_none_of_a_model_gets_into_no_configuration_of_the_gateways(
    name: str,
) -> None:
    with pytest.raises(ConfigError):
        gateway([Upstream(name, "127.0.0.1", 8100)])


HOSTILE = [
    "/a\nglobal", "/a\r\n    daemon", "/a }", "/a'b", '/a"b', "/a#b", "/a$(id)", "/a\tb", "a", "",
    "/a\0", "/a/../b", "/ä", "/a\u2028b", "/a%[env(X)]", "/a\\ b", "/a`b`",
]  # fmt: skip


@pytest.mark.parametrize("path", HOSTILE, ids=ascii)
def test_a_path_that_could_end_a_word_gets_into_no_configuration_of_the_gateways(
    path: str,
) -> None:
    for name in PATHS.__dataclass_fields__:
        with pytest.raises(ConfigError):
            gateway(paths=replace(PATHS, **{name: path}))
    for name in ("api_key_file", "tls_certificate"):
        if path:
            with pytest.raises(ConfigError):
                gateway(**{name: path})


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(name=st.text(max_size=20), path=st.text(max_size=20).map(lambda text: f"/{text}"))
def test_whatever_comes_a_configuration_has_our_lines_or_is_refused(name: str, path: str) -> None:
    expected = keywords(gateway(api_key_file="/etc/keys"))
    try:
        config = gateway([Upstream(name, "127.0.0.1", 8100)], api_key_file=path)
    except ConfigError:
        return
    assert keywords(config) == expected
    assert config.isascii()


def test_the_gateways_block_is_one_program_that_supervisord_reads_as_it_was_meant(
    around: render.Surroundings,
) -> None:
    command = ("/opt/My Tools/synapse-run", "--", "/usr/sbin/haproxy", "-f", "/our etc/haproxy.cfg")
    text = render.render_gateway_block(
        TEMPLATES, command, around.directory, f"{around.log_folder}/gateway.log",
        GatewaySettings(host="::1", port=8443),
    )  # fmt: skip
    sections, process = Supervisord(around.directory).read(text)
    assert list(sections) == ["program:gateway"]
    assert tuple(shlex.split(process.command)) == command
    assert process.environment == {"LLAMA_ARG_HOST": "::1", "LLAMA_ARG_PORT": "8443"}
    assert (process.autostart, process.stopasgroup, process.killasgroup) == (False, False, True)


@pytest.mark.parametrize("word", ["a\nb", "%(ENV_HOME)s", "a;b", "a\0b", "$(id)", "a'b"])
def test_a_word_that_supervisord_could_misread_gets_into_no_block_of_the_gateways(
    around: render.Surroundings, word: str
) -> None:
    with pytest.raises(ConfigError):
        render.render_gateway_block(
            TEMPLATES, ("/x", word), around.directory, "/log", GatewaySettings()
        )
    with pytest.raises(ConfigError):
        render.render_gateway_block(
            TEMPLATES, ("/x",), around.directory, f"/{word}", GatewaySettings()
        )
