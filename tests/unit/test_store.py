"""State on disk: whole or not at all, and a torn file costs only itself."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from supervisor_synapse.adapters import store
from supervisor_synapse.errors import TransientError


@contextlib.contextmanager
def full_disk(size_bytes: int = 16) -> Iterator[None]:
    """No file may grow beyond `size_bytes`: a write fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- writing -------------------------------------------------------------------------------------


def test_a_file_is_written_for_its_owner_alone(tmp_path: Path) -> None:
    store.write_text(tmp_path / "a", "grün\r\n")
    assert (tmp_path / "a").read_bytes() == "grün\r\n".encode()
    assert mode(tmp_path / "a") == 0o600


def test_a_mode_can_be_chosen_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        store.write_text(tmp_path / "a", "x", mode=0o640)
    finally:
        os.umask(before)
    assert mode(tmp_path / "a") == 0o640


def test_a_reader_that_has_the_old_file_open_keeps_it(tmp_path: Path) -> None:
    """The file is replaced, never written into."""
    path = tmp_path / "a"
    store.write_text(path, "old")
    with path.open() as reader:
        store.write_text(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a"]


def test_on_a_full_disk_the_old_file_stays_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a"
    store.write_text(path, "old")
    with full_disk(), pytest.raises(OSError, match="too large"):
        store.write_text(path, "new " * 100)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_text_that_cannot_be_encoded_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    store.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        store.write_text(path, "\ud800")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store.write_text(tmp_path / "none" / "a", "x")


def test_what_is_no_json_changes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        store.write_json(tmp_path / "a", {1, 2})
    assert names(tmp_path) == []


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    """A process writing two versions in turn is killed 20 times; one of them always stands."""
    path = tmp_path / "state.json"
    script = (
        "import pathlib, sys\n"
        "from supervisor_synapse.adapters import store\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "print(flush=True)\n"
        "while True:\n"
        "    for letter in 'ab':\n"
        "        store.write_json(path, letter * 100_000)\n"
    )
    for _ in range(20):
        with subprocess.Popen(
            [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            while not path.exists():
                assert writer.poll() is None
            writer.kill()
        assert store.read_json(path) in ("a" * 100_000, "b" * 100_000)
        path.unlink()


# --- reading -------------------------------------------------------------------------------------

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(value=_JSON.filter(lambda value: value is not None))  # nothing of ours is null
def test_what_was_written_is_read_back(tmp_path: Path, value: object) -> None:
    path = tmp_path / "a.json"
    store.write_json(path, value)
    assert store.read_json(path) == value
    assert path.read_bytes().isascii()


def test_no_file_is_no_value(tmp_path: Path) -> None:
    assert store.read_json(tmp_path / "none") is None
    assert names(tmp_path) == []


TORN = {
    "null": b"null",
    "empty": b"",
    "cut": b'{"a": [1, 2',
    "zeros": bytes(4096),
    "two values": b"1 2",
    "not UTF-8": b'"\xff\xfe"',
    "too deep": b"[" * 100_000,
    "a number of 5000 digits": b"9" * 5000,
}


def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    assert store.read_json(tmp_path / "a.json") is None
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("content", TORN.values(), ids=TORN.keys())
def test_a_torn_file_is_set_aside(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert store.read_json(path) is None
    assert names(tmp_path) == ["a.json.corrupt"]
    assert (tmp_path / "a.json.corrupt").read_bytes() == content


def test_every_torn_prefix_of_a_file_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    whole = json.dumps({"models": ["a", "b"], "at": 1.5}).encode()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert store.read_json(path) is None
        assert not path.exists()


def test_a_file_too_large_to_be_ours_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    assert store.read_json(path) is None
    assert names(tmp_path) == ["a.json.corrupt"]


def test_what_is_no_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    assert store.read_json(tmp_path / "a.json") is None
    assert names(tmp_path) == ["a.json"]


# --- locking -------------------------------------------------------------------------------------


def test_only_one_holds_a_lock(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with store.exclusive(lock), pytest.raises(TransientError, match="another discovery"):
        store.exclusive(lock).__enter__()
    with store.exclusive(lock):
        pass
    assert mode(lock) == 0o600


def test_an_error_inside_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(KeyError), store.exclusive(tmp_path / "lock"):
        raise KeyError
    with store.exclusive(tmp_path / "lock"):
        pass


def test_a_holder_that_is_killed_frees_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    script = (
        "import pathlib, sys\n"
        "from supervisor_synapse.adapters import store\n"
        "with store.exclusive(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(TransientError):
            store.exclusive(lock).__enter__()
        holder.kill()
        holder.wait()
        with store.exclusive(lock):
            pass
