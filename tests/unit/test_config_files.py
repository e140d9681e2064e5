"""Configuration files, read by supervisord's own parser."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from supervisor.options import UnhosedConfigParser

from supervisor_synapse.adapters.config_files import check_block, parse_back
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
