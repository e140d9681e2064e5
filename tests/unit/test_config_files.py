"""Configuration files, read by supervisord's own parser."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from supervisor.medusa import asyncore_25 as asyncore
from supervisor.options import UnhosedConfigParser

from supervisor_synapse.adapters.config_files import broken_files, check_block, parse_back
from supervisor_synapse.errors import ConfigError

# --- blocks, read back ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Block:
    """What was meant, and its text."""

    name: str
    text: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    log_file: str = "/tmp/tiny.log"


LINES = {
    "command": "/bin/cat --model /m/tiny.gguf",
    "environment": 'GGML_NO_BACKTRACE="1"',
    "autostart": "false",
    "autorestart": "false",
    "stopasgroup": "false",
    "killasgroup": "true",
    "stdout_logfile": "/tmp/tiny.log",
}
KEYS = frozenset(LINES)


def block(name: str = "tiny", head: str = "", tail: str = "", **lines: str) -> Block:
    """A block whose lines may be other than meant."""
    text = "\n".join(f"{key}={value}" for key, value in (LINES | lines).items())
    return Block(
        name=name, text=f"{head}[program:{name}]\n{text}\n{tail}",
        command=("/bin/cat", "--model", "/m/tiny.gguf"), environment={"GGML_NO_BACKTRACE": "1"},
    )  # fmt: skip


def test_a_block_as_it_should_be_passes() -> None:
    check_block(block(), KEYS)


@pytest.mark.parametrize(
    "odd",
    [
        block(tail="[program:other]\ncommand=/bin/evil\n"),
        block(tail="[rpcinterface:evil]\nsupervisor.rpcinterface_factory=os:system\n"),
        block(tail="[inet_http_server]\nport=*:9001\n"),
        block(head="[DEFAULT]\nuser=root\n"),
        block(tail="[include]\nfiles=/tmp/*.conf\n"),
        block(tail="user=root\n"),
        block(tail="USER=root\n"),
        block(tail="\x0d[program:other]\n"),
        replace(block(), name="other"),
        Block("tiny", "", ()),
        Block("tiny", "command=/bin/cat\n", ()),
        Block("tiny", "[program:tiny\n", ()),
        Block("tiny", "[program:tiny]\nwords\n", ()),
        Block("tiny", "[program:tiny]\ncommand=/bin/cat\n", ()),
    ],
    ids=lambda odd: ascii(odd.text[-40:]),
)
def test_a_block_with_more_or_less_than_its_own_keys_is_refused(odd: Block) -> None:
    with pytest.raises(ConfigError, match=odd.name):
        check_block(odd, KEYS)


@given(st.text(max_size=30))
def test_no_text_in_a_value_opens_a_section_unnoticed(text: str) -> None:
    """Either the block is refused, or it has its one section and its own keys only."""
    hostile = block(command=f"/bin/cat {text}")
    try:
        check_block(hostile, KEYS)
    except ConfigError:
        return
    parser = UnhosedConfigParser()
    parser.read_file(io.StringIO(hostile.text, newline=None))
    assert parser.sections() == ["program:tiny"]
    assert set(parser.options("program:tiny")) == KEYS


MAIN = """[supervisord]
logfile = {here}/s.log
[include]
files = {include}
"""


def laid_down(
    folder: Path, *blocks: Block, include: str = "conf.d/*.conf", prefix: str = "p", more: str = ""
) -> tuple[Path, Path]:
    """A main file, and a folder with these blocks for its conf.d."""
    etc, candidates = folder / prefix / "etc", folder / prefix / "run" / "candidates"
    (etc / "conf.d").mkdir(parents=True)
    candidates.mkdir(parents=True)
    (etc / "supervisord.conf").write_text(MAIN.format(here=etc, include=include) + more)
    for one in blocks:
        (candidates / f"{one.name}.conf").write_text(one.text)
    return etc / "supervisord.conf", candidates


def test_blocks_come_back_as_they_were_meant(tmp_path: Path) -> None:
    one, two = block("one"), block("two")
    parse_back(*laid_down(tmp_path, one, two), [one, two])


@pytest.mark.parametrize("include", ["%(here)s/conf.d/*.conf", "./conf.d/*.conf",
                                     "other/*.conf conf.d/*.conf"])  # fmt: skip
def test_the_main_file_may_include_them_in_its_own_words(tmp_path: Path, include: str) -> None:
    parse_back(*laid_down(tmp_path, block(), include=include), [block()])


def test_a_prefix_with_blanks_is_read_too(tmp_path: Path) -> None:
    parse_back(*laid_down(tmp_path, block(), prefix="my models"), [block()])


def test_a_folder_that_is_kept_elsewhere_is_read_too(tmp_path: Path) -> None:
    """As by those who keep their configuration in one place, and link to it."""
    main, candidates = laid_down(tmp_path, block())
    kept = tmp_path / "far" / "away" / "kept"
    kept.parent.mkdir(parents=True)
    main.parent.rename(kept)
    main.parent.symlink_to(kept)
    parse_back(main, candidates, [block()])
    (candidates / "mine.conf").write_text("words")
    with pytest.raises(ConfigError, match=r"p/etc/conf\.d/mine\.conf"):
        parse_back(main, candidates, [block()])


def test_the_blocks_that_stand_are_not_read_but_the_new_ones(tmp_path: Path) -> None:
    main, candidates = laid_down(tmp_path, block())
    (main.parent / "conf.d" / "old.conf").write_text("broken")
    parse_back(main, candidates, [block()])


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ({"command": "/bin/cat --model /m/other.gguf"}, "command"),
        ({"command": "/bin/cat --model /m/tiny.gguf ; --evil"}, "command"),
        ({"command": "/bin/cat --model %(here)s/tiny.gguf"}, "command"),
        ({"environment": 'GGML_NO_BACKTRACE="0"'}, "environment"),
        ({"autostart": "true"}, "autostart"),
        ({"autorestart": "unexpected"}, "autorestart"),
        ({"killasgroup": "false"}, "killasgroup"),
        ({"stdout_logfile": "/tmp/other.log"}, "stdout_logfile"),
    ],
)
def test_a_value_that_comes_back_as_another_is_refused(
    tmp_path: Path, lines: dict[str, str], named: str
) -> None:
    meant = block(**lines)
    if "; --evil" in meant.text:  # cut by the parser: what was meant had it
        meant = replace(meant, command=(*meant.command, ";", "--evil"))
    with pytest.raises(ConfigError, match=f"{named} of tiny"):
        parse_back(*laid_down(tmp_path, meant), [meant])


@pytest.mark.parametrize(
    "lines",
    [{"command": "/bin/cat %(ENV_NO_SUCH)s"}, {"command": "/bin/cat 100%"},
     {"environment": "A"}, {"autostart": "perhaps"}, {"stopasgroup": "true",
                                                      "killasgroup": "false"}],
    ids=str,
)  # fmt: skip
def test_what_supervisord_would_not_read_is_refused(tmp_path: Path, lines: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="supervisord would not read the configuration"):
        parse_back(*laid_down(tmp_path, block(**lines)), [block()])


def test_a_block_that_is_not_included_is_missed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not find the program tiny"):
        parse_back(*laid_down(tmp_path, block(), include="elsewhere/*.conf"), [block()])


def test_a_main_file_without_an_include_is_refused(tmp_path: Path) -> None:
    main, candidates = laid_down(tmp_path, block())
    main.write_text("[supervisord]\n")
    with pytest.raises(ConfigError, match=r"\[include\]"):
        parse_back(main, candidates, [block()])


@pytest.mark.parametrize("text", [b"[supervisord]\nwords\n", b"\xff\xfe[supervisord]\n", b""])
def test_a_broken_main_file_is_named(tmp_path: Path, text: bytes) -> None:
    main, candidates = laid_down(tmp_path, block())
    main.write_bytes(text)
    with pytest.raises(ConfigError, match=r"supervisord\.conf"):
        parse_back(main, candidates, [block()])


def test_a_main_file_that_is_gone_is_named(tmp_path: Path) -> None:
    main, candidates = laid_down(tmp_path, block())
    main.unlink()
    with pytest.raises(ConfigError, match=r"supervisord\.conf"):
        parse_back(main, candidates, [block()])


@pytest.mark.parametrize("text", [b"words\n", b"[program:x]\ncommand=/bin/\xff\n"])
def test_a_broken_file_of_the_users_is_named_by_its_own_path(tmp_path: Path, text: bytes) -> None:
    """Not by that of the copy which was read."""
    main, candidates = laid_down(tmp_path, block())
    (candidates / "mine.conf").write_bytes(text)
    with pytest.raises(ConfigError, match=r"etc/conf\.d/mine\.conf") as caught:
        parse_back(main, candidates, [block()])
    assert str(candidates) not in str(caught.value)
    assert "\n" not in str(caught.value)


# --- what supervisord would not take -------------------------------------------------------------

PROGRAM = "[program:{name}]\ncommand=/bin/cat\n"


@dataclass(frozen=True, slots=True)
class Etc:
    """A main file and what it includes."""

    main: Path

    def write(self, name: str, text: str | bytes) -> Path:
        path = self.main.parent / "conf.d" / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    def found(self) -> list[tuple[str, int | None]]:
        """Name and line of each broken file."""
        return [(broken.path.name, broken.line) for broken in broken_files(self.main)]

    def takes(self) -> bool:
        """Whether a real supervisord starts on it; it is ended again."""
        command = [sys.executable, "-m", "supervisor.supervisord", "-n", "-c", str(self.main)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            cwd=self.main.parent,
        ) as supervisord:  # fmt: skip
            assert supervisord.stdout is not None
            try:
                return any("supervisord started with pid" in line for line in supervisord.stdout)
            finally:
                supervisord.kill()


@pytest.fixture
def etc(tmp_path: Path) -> Etc:
    """Two programs that nothing is wrong with."""
    (tmp_path / "conf.d").mkdir()
    main = tmp_path / "supervisord.conf"
    main.write_text(MAIN.format(here=tmp_path, include="conf.d/*.conf"))
    made = Etc(main)
    for name in ("a", "z"):
        made.write(f"{name}.conf", PROGRAM.format(name=name))
    return made


def test_nothing_is_wrong_with_what_supervisord_takes(etc: Etc) -> None:
    assert broken_files(etc.main) == ()
    assert etc.takes()


HEAD = PROGRAM.format(name="m")
BROKEN: dict[str, tuple[str | bytes, int | None]] = {
    "words": (f"{HEAD}; a comment\n\nwords\n", 5),
    "words before a section": ("words\n", 1),
    "a section that is not closed": ("\n[program:m\n", 2),
    "no UTF-8": (HEAD.encode() + b"user=\xff\n", 3),
    "a byte order mark": (b"\xef\xbb\xbf" + HEAD.encode(), 1),
    "UTF-16": (HEAD.encode("utf-16"), 1),
    "a stray %": ("[program:m]\ncommand=/bin/cat 100%\n", 2),
    "a stray % further down": ("[program:m]\ncommand=/bin/cat\n  a\n  ; b\n  100%\n", 2),
    "an unknown name": ("[program:m]\ncommand=/bin/cat %(nobody)s\n", 2),
    "an unknown variable": (f"{HEAD}directory=%(ENV_NO_SUCH)s\n", 3),
    "here, escaped": ("[program:m]\ncommand=/bin/cat %%(here)s\n", 2),
    "no command": ("\n[program:m]\nstartsecs=1\n", 2),
    "stopsignal": (f"{HEAD}stopsignal=NOPE\n", 3),
    "startsecs": (f"{HEAD}stopwaitsecs=1\nstartsecs : x\n", 4),
    "priority": (f"{HEAD}priority=high\n", 3),
    "autorestart": (f"{HEAD}autorestart=maybe\n", 3),
    "exitcodes": (f"{HEAD}exitcodes=0,256\n", 3),
    "umask": (f"{HEAD}umask=9\n", 3),
    "user": (f"{HEAD}user=nobody-of-this-name\n", 3),
    "a large user": (f"{HEAD}user=99999999999999999999\n", 3),
    "numprocs": (f"{HEAD}numprocs=2\n", 3),
    "environment": (f"{HEAD}environment=A\n", 3),
    "an open quote": (f"{HEAD}environment=A=\"1\n", 3),
    "a log's folder": (f"{HEAD}stdout_logfile=/no/such/folder/m.log\n", 3),
    "a log's folder, from here": (f"{HEAD}stdout_logfile=%(here)s/no/m.log\n", 3),
    "groups": (f"{HEAD}stopasgroup=true\nkillasgroup=false\n", 3),
    "the name of a program": ("[program:a b]\ncommand=/bin/cat\n", 1),
    "the name of a process": (f"{HEAD}process_name=a/b\n", 3),
    "a group of nobody": ("[group:g]\nprograms=a,nobody\n", 2),
    "a listener without events": ("[eventlistener:m]\ncommand=/bin/cat\n", 1),
    "a listener of what is not sent": ("[eventlistener:m]\ncommand=/bin/cat\nevents=NOPE\n", 3),
    "a plugin that is not there": (
        "[rpcinterface:m]\nsupervisor.rpcinterface_factory=no.such:thing\n", 2,
    ),
    "a port": ("[inet_http_server]\nport=high\n", 2),
    "a server of its own": ("[supervisord]\nminfds=few\n", 2),
    "a user of its own": ("[supervisord]\nuser=nobody-of-this-name\n", 2),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named_with_its_line(etc: Etc, kind: str) -> None:
    """The siblings on both sides of it are not."""
    text, line = BROKEN[kind]
    path = etc.write("m.conf", text)
    (broken,) = broken_files(etc.main)
    assert (broken.path, broken.line) == (path, line)
    assert str(broken).startswith(f"{path}, line {line}: ")
    assert str(broken).isascii()
    assert str(broken).isprintable()


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_called_broken_supervisord_ends_over(etc: Etc, kind: str) -> None:
    etc.write("m.conf", BROKEN[kind][0])
    assert not etc.takes()


FINE = {
    "nothing": b"",
    "a comment": b"; nothing\n",
    "an include of its own, which is not read": b"[include]\nfiles=/no/such/file\n",
    "a section of others": b"[something:else]\nx=100%\n",
    "a program that there is already": b"[program:a]\ncommand=/bin/echo\n",
    "a group": b"[group:g]\nprograms=a,z\n",
    "carriage returns": HEAD.replace("\n", "\r\n").encode(),
    "non-ASCII": "[program:m]\ncommand=/bin/cat é\n".encode(),
    "no such command": b"[program:m]\ncommand=/no/such/program\n",
    "an empty name": b"[program:]\ncommand=/bin/cat\n",
    "here": b"[program:m]\ncommand=/bin/cat %(here)s %(program_name)s 100%%\n",
}


@pytest.mark.parametrize("kind", FINE)
def test_what_is_called_fine_supervisord_takes(etc: Etc, kind: str) -> None:
    etc.write("m.conf", FINE[kind])
    assert broken_files(etc.main) == ()
    assert etc.takes()


def test_every_broken_file_is_found_not_the_first_alone(etc: Etc) -> None:
    etc.write("b.conf", "words\n")
    etc.write("c.conf", f"{HEAD}priority=x\n")
    etc.write("d.conf", "[program:d]\ncommand=/bin/cat\npriority=x\n")
    etc.write("e.conf", b"\xff")
    assert sorted(etc.found()) == [("b.conf", 1), ("c.conf", 3), ("d.conf", 3), ("e.conf", 1)]


@pytest.mark.parametrize(
    ("more", "line"),
    [("[program:x]\ncommand=100%\n", 6), ("[unix_http_server]\nfile=s\nchmod=9\n", 7),
     ("words\n", 5), ("[supervisord]\nloglevel=loud\n", 6), ("[supervisord]\nlogfile=/\n", 6)],
)  # fmt: skip
def test_the_main_file_is_named_too(etc: Etc, more: str, line: int) -> None:
    etc.main.write_text(etc.main.read_text() + more)
    assert etc.found() == [("supervisord.conf", line)]
    assert not etc.takes()


def test_a_broken_main_file_hides_no_other(etc: Etc) -> None:
    """And what others need of it, they still have."""
    etc.main.write_text(
        etc.main.read_text() + "[supervisord]\nenvironment=FOO=1\n[program:x]\ncommand=100%\n"
    )
    etc.write("b.conf", "[program:b]\ncommand=/bin/cat %(ENV_FOO)s\n")
    etc.write("c.conf", "[program:c]\ncommand=/bin/cat\nstartsecs=x\n")
    assert sorted(etc.found()) == [("c.conf", 3), ("supervisord.conf", 8)]


def test_a_group_is_not_blamed_for_a_program_that_is_broken(etc: Etc) -> None:
    etc.main.write_text(etc.main.read_text() + "[group:g]\nprograms=a,m\n")
    etc.write("m.conf", f"{HEAD}startsecs=x\n")
    assert etc.found() == [("m.conf", 3)]
    etc.write("m.conf", f"{HEAD}words\n")
    assert etc.found() == [("m.conf", 3)]


def test_two_files_that_only_together_are_refused_are_found(etc: Etc) -> None:
    etc.write("b.conf", "[group:g]\nprograms=m\n")
    etc.write("m.conf", HEAD)
    assert broken_files(etc.main) == ()
    etc.write("n.conf", "[fcgi-program:m]\ncommand=/bin/cat\nsocket=tcp://localhost:1\n")
    assert len(etc.found()) == 1
    assert not etc.takes()


def test_a_pipe_is_not_waited_for(etc: Etc) -> None:
    """supervisord itself would wait for a writer, for ever."""
    os.mkfifo(etc.main.parent / "conf.d" / "pipe.conf")
    (broken,) = broken_files(etc.main)
    assert "not a regular file" in str(broken)


def test_a_file_that_supervisord_would_silently_leave_out_is_named(etc: Etc) -> None:
    (etc.main.parent / "conf.d" / "gone.conf").symlink_to("/no/such/file")
    (broken,) = broken_files(etc.main)
    assert str(broken).endswith(
        "gone.conf: cannot be read (No such file or directory): supervisord would go on without it"
    )
    assert etc.takes()


def test_folders_and_files_switched_off_are_none_of_its_business(etc: Etc) -> None:
    (etc.main.parent / "conf.d" / "folder.conf").mkdir()
    (etc.main.parent / "conf.d" / "off.conf").symlink_to("/dev/null")
    etc.write("m.conf.rejected", "words")
    etc.write(".hidden.conf", "words")
    assert broken_files(etc.main) == ()
    assert etc.takes()


@pytest.mark.parametrize("text", [None, b"\xff", b"", b"words"])
def test_a_main_file_that_is_none_is_named(etc: Etc, text: bytes | None) -> None:
    etc.main.unlink()
    if text is not None:
        etc.main.write_bytes(text)
    assert [name for name, _ in etc.found()] == ["supervisord.conf"]


def test_texts_can_be_tried_before_they_are_written(etc: Etc) -> None:
    folder = etc.main.parent / "conf.d"
    before = sorted(folder.iterdir())
    bad = f"{HEAD}startsecs=x\n"
    (new,) = broken_files(etc.main, {folder / "new.conf": bad})
    assert (new.path, new.line) == (folder / "new.conf", 3)
    assert [b.path.name for b in broken_files(etc.main, {folder / "a.conf": bad})] == ["a.conf"]
    assert broken_files(etc.main, {folder / "new.conf.rejected": bad}) == ()
    assert broken_files(etc.main, {folder / ".new.conf": bad}) == ()
    etc.write("m.conf", bad)
    assert broken_files(etc.main, {folder / "m.conf": HEAD}) == ()
    assert broken_files(etc.main, {etc.main: "[supervisord]\n"}) == ()
    assert sorted(folder.iterdir()) == sorted([*before, folder / "m.conf"])


def test_the_process_that_asks_stays_as_it_was(etc: Etc) -> None:
    """It is asked inside supervisord."""
    etc.write("m.conf", f"{HEAD}umask=0\nstartsecs=x\n")
    etc.main.write_text(etc.main.read_text() + "[supervisord]\numask=077\ndirectory=/\n")

    def state() -> tuple[object, ...]:
        mask = os.umask(0)
        os.umask(mask)
        signals = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
        files = psutil.Process().num_fds()
        return mask, os.getcwd(), dict(os.environ), signals, files, sorted(asyncore.socket_map)

    broken_files(etc.main)
    before = state()
    assert len(broken_files(etc.main)) == 1
    assert state() == before


def test_fifty_models_are_looked_at_in_a_moment(etc: Etc) -> None:
    """supervisord stands still meanwhile. 27 ms; wide, for a busy machine."""
    for number in range(50):
        etc.write(f"m{number}.conf", block(f"m{number}").text)
    broken_files(etc.main)
    took = []
    for _ in range(3):
        begun = time.perf_counter()
        assert broken_files(etc.main) == ()
        took.append(time.perf_counter() - begun)
    assert min(took) < 0.2


@given(st.binary(max_size=60))
def test_whatever_stands_in_a_file_the_answer_is_a_line(data: bytes) -> None:
    with tempfile.TemporaryDirectory(prefix="syn") as folder:
        main = Path(folder, "supervisord.conf")
        main.write_text("[supervisord]\nlogfile=/tmp/x.log\n[include]\nfiles=*.ini\n")
        Path(folder, "m.ini").write_bytes(b"[program:m]\ncommand=" + data)
        for broken in broken_files(main):
            assert str(broken).isascii()
            assert str(broken).isprintable()
            assert len(str(broken)) < 700
