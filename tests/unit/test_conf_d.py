"""conf.d as anybody may leave it: what is no block of ours costs only itself, and hangs nobody."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor_synapse import commit as commits
from supervisor_synapse import revise, rollback
from supervisor_synapse.adapters import conf_d
from supervisor_synapse.errors import ConfigError, SynapseError
from tests.unit.applied import FAILURE, Applied, on_disk, tiny

SECONDS = 5


@pytest.fixture(autouse=True)
def _nobody_waits() -> Iterator[None]:
    """A named pipe that is waited for fails its test."""

    def too_long(number: int, frame: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def at(tmp_path: Path) -> Applied:
    """alpha has a former good block; beta is good."""
    found = Applied.at(tmp_path / "at")
    found.discover(tiny("alpha"), tiny("beta", port=8101))
    found.prove("alpha", "beta")
    found.discover(tiny("alpha", "--mlock"), tiny("beta", port=8101))
    return found


# --- looking -------------------------------------------------------------------------------------


def digests(folder: Path) -> dict[str, str]:
    return {name: one.digest for name, one in conf_d.scan(folder, {}).items()}


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe\0", b"\r\n\r", "\ufeff[program:a]".encode(), b"x" * 10_000_000],
    ids=["empty", "no UTF-8", "carriage returns", "byte order mark", "10 MB"],
)
def test_a_file_is_known_by_its_bytes_whatever_they_are(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.conf").write_bytes(content)
    assert digests(tmp_path) == {"a": sha(content)}


def test_only_blocks_are_looked_at(tmp_path: Path) -> None:
    for name in ("a.conf.rejected", "a.conf.new", ".a.conf.x1", "a.CONF", "conf", "a.txt"):
        (tmp_path / name).write_text("x")
    assert digests(tmp_path) == {}


@pytest.mark.parametrize("name", ["a b", "\u00fc", "a\nb", "-", "..", "%(here)s", "a" * 200])
def test_odd_names_are_names(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.conf").write_text("x")
    assert digests(tmp_path) == {name: sha(b"x")}


def test_a_name_that_is_no_text_is_one_too(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/\xff.conf", "w") as file:
        file.write("x")
    assert digests(tmp_path) == {"\udcff": sha(b"x")}


def fifo(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(path.parent):
        listener.bind(path.name)


NO_FILES = [fifo, folder, device, unix_socket]


@pytest.mark.parametrize("make", NO_FILES)
def test_what_is_no_file_is_no_text(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "a.conf")
    assert digests(tmp_path) == {"a": ""}


def test_a_link_is_what_it_leads_to_and_one_to_nothing_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("x")
    (tmp_path / "a.conf").symlink_to("target")
    (tmp_path / "b.conf").symlink_to("nowhere")
    (tmp_path / "c.conf").symlink_to("c.conf")
    assert digests(tmp_path) == {"a": sha(b"x")}


def test_a_file_is_read_again_only_when_it_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.conf"
    path.write_text("one")
    before = conf_d.scan(tmp_path, {})
    as_it_was = path.stat()
    with path.open("r+") as file:  # the same file, and the same time
        file.write("two")
    os.utime(path, ns=(as_it_was.st_atime_ns, as_it_was.st_mtime_ns))
    assert conf_d.scan(tmp_path, before)["a"] is before["a"]
    os.utime(path, ns=(as_it_was.st_atime_ns, as_it_was.st_mtime_ns + 1))
    assert conf_d.scan(tmp_path, before)["a"].digest == sha(b"two")
    path.unlink()
    assert conf_d.scan(tmp_path, before) == {}


def test_a_folder_that_is_not_there_is_an_error_for_the_caller(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        conf_d.scan(tmp_path / "gone", {})


@given(st.text())
def test_the_command_of_any_text_is_words_or_none(text: str) -> None:
    assert all(isinstance(word, str) for word in conf_d.command_words(text))


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ("[program:a]\ncommand=run --a 'b c' 5%%\n", ["run", "--a", "b c", "5%"]),
        ("command = run  ; a comment\n", ["run"]),
        ("command=run --a;b\n", ["run", "--a;b"]),
        (";command=run\n", []),
        ("mycommand=run\n", []),
        ("command=it's\n", []),
        ("", []),
    ],
)
def test_a_command_is_read_as_supervisord_reads_it(block: str, words: list[str]) -> None:
    assert conf_d.command_words(block) == words


# --- changing ------------------------------------------------------------------------------------


def tidied(at: Applied, make: Callable[[Path], None]) -> None:
    path = at.deployment.block("alpha")
    path.unlink()
    make(path)


@pytest.mark.parametrize("make", NO_FILES)
def test_going_back_does_not_touch_what_is_no_file(
    at: Applied, make: Callable[[Path], None]
) -> None:
    tidied(at, make)
    before = at.deployment.block("alpha").lstat().st_ino
    with pytest.raises(ConfigError, match="was edited"):
        rollback.roll_back(at.deployment, "alpha", failure=FAILURE)
    assert at.deployment.block("alpha").lstat().st_ino == before


@pytest.mark.parametrize("make", NO_FILES)
def test_what_is_no_file_keeps_no_other_model_from_being_changed(
    at: Applied, make: Callable[[Path], None]
) -> None:
    """Even while something is to be written there."""
    at.discover(tiny("alpha", "--mlock"), tiny("beta", "--mlock", port=8101))
    with commits.locked(at.deployment):
        found = at.registry()
        untold = {"alpha": at.standings()["alpha"].digest}
        step = commits.Step(registry=found, renewed=("alpha",))
        assert untold
        commits.commit(at.deployment, step, None, tell=True)
    tidied(at, make)
    rollback.roll_back(at.deployment, "beta", failure=FAILURE)
    assert at.standings()["beta"].digest == at.on_disk_of("beta")


@pytest.mark.parametrize("make", NO_FILES)
def test_what_is_no_file_is_not_adopted(at: Applied, make: Callable[[Path], None]) -> None:
    before = at.standings()
    tidied(at, make)
    revise.adopt(at.deployment, on_disk(at.deployment, "alpha"))
    assert at.standings() == before


@pytest.mark.parametrize("make", NO_FILES)
def test_what_is_no_file_is_not_set_aside(at: Applied, make: Callable[[Path], None]) -> None:
    """supervisord skips it, or ends: somebody has to be told, and nothing is removed."""
    tidied(at, make)
    with contextlib.suppress(SynapseError, OSError):
        rollback.set_aside(at.deployment, "alpha", "", FAILURE)
    path = at.deployment.block("alpha")
    assert path.is_file() or path.lstat()


def test_an_edit_with_the_line_ends_of_another_system_is_one_like_any_other(at: Applied) -> None:
    """Its block is known by its bytes; so it can fail its trial, and is gone back from."""
    path = at.deployment.block("beta")
    edited = path.read_bytes().replace(b"\n", b"\r\n")
    path.write_bytes(edited)
    revise.adopt(at.deployment, on_disk(at.deployment, "beta"))
    assert at.standings()["beta"].digest == at.on_disk()["beta"] == sha(edited)
    rollback.roll_back(at.deployment, "beta", failure=FAILURE)
    assert b"\r" not in path.read_bytes()
    rollback.roll_back(at.deployment, "alpha", failure=FAILURE)


def test_an_edit_that_is_no_text_is_not_adopted(at: Applied) -> None:
    before = at.standings()
    at.deployment.block("beta").write_bytes(b"[program:beta]\ncommand=x\n;\xff\n")
    with pytest.raises(ValueError, match="utf-8"):
        revise.adopt(at.deployment, on_disk(at.deployment, "beta"))
    assert at.standings() == before


def test_a_linked_block_is_gone_back_from_and_what_it_led_to_stays(
    at: Applied, tmp_path: Path
) -> None:
    path, elsewhere = at.deployment.block("alpha"), tmp_path / "dotfiles.conf"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    text = elsewhere.read_text()
    rollback.roll_back(at.deployment, "alpha", failure=FAILURE)
    assert elsewhere.read_text() == text
    assert not path.is_symlink()
    assert at.on_disk()["alpha"] == at.standings()["alpha"].digest
