"""The registry: what was written is read back; what cannot be is set aside and rebuilt."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from supervisor_synapse.adapters import registry
from supervisor_synapse.adapters.registry import Entry, Registry
from supervisor_synapse.core.model import Estimate, Role, Tier, Variant
from supervisor_synapse.core.plan import Choice
from supervisor_synapse.core.settings import (
    DEFAULT_TIERS,
    Enable,
    Reserve,
    Settings,
    StopPolicy,
    WhenFull,
)
from tests.unit.builders import program, section, taking
from tests.unit.test_store import full_disk, mode, names

CHOICE = Choice(
    8100, 4096, "CUDA0,RPC1", fitted=True, basis="1,2", placed=True, layers=33, split=(20, 13),
    offered="CUDA0,RPC1", rung=2, variant="abc", takes=(("CUDA0", 5), ("CPU", 7)),
)  # fmt: skip


RUNG = Variant(
    "fallback c", "x", 4096, "CPU", ("--port", "1"), taking(5, "CUDA0"),
    "/models/\udcff\u2028.gguf", "/p", ("/1",),
)  # fmt: skip


def entry(key: str, name: str, **changes: Any) -> Entry:
    values: dict[str, Any] = {"choice": CHOICE, "digests": ("d1", "d2"), "present": True}
    return Entry(name=name, key=key, **(values | changes))


FULL = Registry(
    entries={
        "hf:a/b:c.gguf": entry("hf:a/b:c.gguf", "c"),
        "file:/m/\\xe9.gguf": entry("file:/m/\\xe9.gguf", "d", digests=(), present=False),
    },
    programs=(
        program(key="hf:a/b:c.gguf", name="c"),
        program(
            key="x", name="d", repo=None, tier=Tier.POWERFUL, role=Role.VISION, fallback="c",
            projector_path="/p", shards=("/1", "/2"), pinned=True, arguments=("--a", "x y"),
            model_path="/models/\udcff\u2028.gguf", rung=1, ladder=(RUNG, RUNG),
        ),
    ),
    settings=Settings(
        cache_dirs=("/a", "/é"), enable=Enable.ALL, when_full=WhenFull.WAIT,
        memory_reserve=Reserve(0, 0.125), stop=StopPolicy(1, 2),
        tiers=(replace(DEFAULT_TIERS[0], priority=1), *DEFAULT_TIERS[1:]),
        models=(section("a*", context=4096, args=("--x",)), section("*", context=None)),
    ),
    generation=7,
    demo=True,
)  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "registry.json"


# --- written and read ----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [FULL, Registry()], ids=["full", "empty"])
def test_what_was_saved_is_loaded(path: Path, value: Registry) -> None:
    """Also a path that is not UTF-8, and what a later section has set back to `auto`."""
    registry.save(path, value)
    assert registry.load(path) == value
    assert path.read_bytes().isascii()
    assert mode(path) == 0o600


def test_saving_again_changes_no_byte(path: Path) -> None:
    registry.save(path, FULL)
    before = path.read_bytes()
    registry.save(path, registry.load(path))
    assert path.read_bytes() == before


def test_where_there_is_none_nothing_is_known(path: Path) -> None:
    assert registry.load(path) == Registry()
    assert names(path.parent) == []


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    key=st.text(), name=st.text(), digests=st.lists(st.text(), max_size=9), port=st.integers(),
    basis=st.text(), flags=st.tuples(*[st.booleans()] * 3),
)  # fmt: skip
def test_any_entry_is_loaded_as_it_was_saved(
    path: Path, key: str, name: str, digests: list[str], port: int, basis: str,
    flags: tuple[bool, bool, bool],
) -> None:  # fmt: skip
    choice = Choice(port, 4096, name, fitted=flags[0], basis=basis, placed=flags[1])
    made = entry(key, name, choice=choice, digests=tuple(digests), present=flags[2])
    value = Registry({key: made}, (program(name=name, key=key, file=basis),))
    registry.save(path, value)
    assert registry.load(path) == value


def test_what_others_ask_of_it() -> None:
    assert FULL.names() == {"hf:a/b:c.gguf": "c", "file:/m/\\xe9.gguf": "d"}
    assert FULL.digests() == {"c": ("d1", "d2"), "d": ()}
    assert FULL.paths() == {"hf:a/b:c.gguf": "/models/tiny.gguf",
                            "x": "/models/\udcff\u2028.gguf"}  # fmt: skip


def test_a_model_on_a_rung_of_another_has_its_own_path_all_the_same() -> None:
    rung = Variant("as configured", "x", 4096, "CPU", (), Estimate(), "/models/own.gguf")
    lower = replace(rung, key="y", model_path="/models/other.gguf")
    stepped = program(key="x", model_path="/models/other.gguf", ladder=(rung, lower), rung=1)
    assert Registry(programs=(stepped,)).paths() == {"x": "/models/own.gguf"}


def test_what_was_chosen_stands_but_not_the_port_that_went_to_another() -> None:
    away, there = replace(CHOICE, port=8101), CHOICE
    entries = {"a": entry("a", "a", choice=away, present=False), "b": entry("b", "b")}
    assert Registry(entries).choices() == {"a": away, "b": there}
    entries["c"] = entry("c", "c", choice=away)
    assert Registry(entries).choices() == {"a": replace(away, port=0), "b": there, "c": away}


# --- digests -------------------------------------------------------------------------------------


@given(written=st.lists(st.sampled_from("abcdefghijkl"), min_size=1, max_size=40))
def test_the_last_few_blocks_written_are_known_newest_first(written: list[str]) -> None:
    digests: tuple[str, ...] = ()
    for digest in written:
        digests = registry.with_digest(digests, digest)
    newest_first = list(dict.fromkeys(reversed(written)))
    assert list(digests) == newest_first[: len(digests)]
    assert len(digests) == min(len(newest_first), 8)


# --- torn, corrupt, of another time --------------------------------------------------------------


def saved(path: Path) -> Any:
    """The JSON of FULL, to be spoilt."""
    registry.save(path, FULL)
    return json.loads(path.read_bytes())


def assert_set_aside(path: Path, content: bytes) -> None:
    """Nothing is known; what was there is kept beside, and the place is free again."""
    path.write_bytes(content)
    assert registry.load(path) == Registry()
    assert not path.exists()
    assert (path.parent / "registry.json.corrupt").read_bytes() == content
    registry.save(path, FULL)
    assert registry.load(path) == FULL


def test_one_torn_at_any_place_is_set_aside_and_rebuilt(path: Path) -> None:
    registry.save(path, FULL)
    whole = path.read_bytes().rstrip(b"\n")
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        assert registry.load(path) == Registry()
        assert names(path.parent) == ["registry.json.corrupt"]
    assert_set_aside(path, whole[: len(whole) // 2])


def _spoil(*place: Any, value: Any) -> Callable[[Any], Any]:
    """Put `value` where `place` leads."""

    def spoil(whole: Any) -> Any:
        inner = whole
        for step in place[:-1]:
            inner = inner[step]
        inner[place[-1]] = value
        return whole

    return spoil


def _lose(*place: Any) -> Callable[[Any], Any]:
    def lose(whole: Any) -> Any:
        inner = whole
        for step in place[:-1]:
            inner = inner[step]
        del inner[place[-1]]
        return whole

    return lose


KEY = "hf:a/b:c.gguf"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _: [], lambda _: "registry", lambda _: 1, lambda _: True,
        _spoil("entries", value=[]), _spoil("entries", value={KEY: None}),
        _spoil("entries", KEY, "name", value=1), _spoil("entries", KEY, "digests", value="d"),
        _spoil("entries", KEY, "choice", value={}), _spoil("entries", KEY, "present", value="?"),
        _spoil("entries", KEY, "choice", "port", value="x"),
        _spoil("entries", KEY, "choice", "port", value=8100.5),
        _spoil("entries", KEY, "choice", "context", value=None),
        _spoil("programs", value={}), _spoil("programs", 0, value="c"),
        _spoil("programs", 0, "tier", value="HUGE"), _spoil("programs", 0, "role", value=None),
        _spoil("programs", 0, "arguments", value=[1]), _spoil("programs", 0, "name", value=[]),
        _spoil("settings", "enable", value="maybe"), _spoil("settings", "tiers", value=[{}]),
        _spoil("settings", "stop", "drain_seconds", value="soon"),
        _spoil("generation", value="many"), _spoil("version", value="first"),
        _lose("entries", KEY, "choice"), _lose("entries", KEY, "choice", "basis"),
        _lose("programs", 0, "model_path"),
    ],
)  # fmt: skip
def test_one_with_wrong_types_is_set_aside_and_rebuilt(
    path: Path, spoil: Callable[[Any], Any]
) -> None:
    assert_set_aside(path, json.dumps(spoil(saved(path))).encode())


@pytest.mark.parametrize("version", [0, 2, -1, 10**30])
def test_one_of_another_version_is_set_aside_not_written_over(path: Path, version: int) -> None:
    """Whoever goes back to the other version finds it."""
    assert_set_aside(path, json.dumps(_spoil("version", value=version)(saved(path))).encode())


@pytest.mark.parametrize(
    ("field", "otherwise"),
    [
        ("placed", False), ("layers", 0), ("split", ()), ("offered", ""), ("rung", 0),
        ("variant", ""), ("takes", ()),
    ],
)  # fmt: skip
def test_one_from_before_a_choice_said_so_much_is_loaded(
    path: Path, field: str, otherwise: object
) -> None:
    value = _lose("entries", KEY, "choice", field)(saved(path))
    path.write_text(json.dumps(value))
    changes: dict[str, Any] = {field: otherwise}
    assert registry.load(path).choices()[KEY] == replace(CHOICE, **changes)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["entries", "programs", "settings", "generation", "version", "x"]),
        inner, max_size=4,
    ),
    max_leaves=8,
)  # fmt: skip


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(value=_JSON)
def test_no_json_whatever_raises(path: Path, value: Any) -> None:
    """It is a registry, or it is out of the way."""
    path.write_text(json.dumps(value))
    found = registry.load(path)
    assert isinstance(found, Registry)
    assert found.version == 1
    assert path.exists() or found == Registry()
    registry.save(path, found)
    assert registry.load(path) == found


# --- written whole or not at all -----------------------------------------------------------------


def test_on_a_full_disk_the_last_one_stays(path: Path) -> None:
    registry.save(path, FULL)
    with full_disk(), pytest.raises(OSError, match="too large"):
        registry.save(path, replace(FULL, generation=8))
    assert registry.load(path) == FULL
    assert names(path.parent) == ["registry.json"]


def test_a_discovery_killed_while_writing_leaves_one_or_the_other(path: Path) -> None:
    """The same registry of two generations, written in turn; the writer is killed five times."""
    script = (
        "import pathlib, sys\n"
        "from dataclasses import replace\n"
        "from supervisor_synapse.adapters import registry\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "one = registry.load(path)\n"
        "print(flush=True)\n"
        "while True:\n"
        "    for generation in (7, 8):\n"
        "        registry.save(path, replace(one, generation=generation))\n"
    )
    registry.save(path, FULL)
    for _ in range(5):
        before = path.stat().st_ino
        with subprocess.Popen(
            [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            while path.stat().st_ino == before:
                assert writer.poll() is None
            writer.kill()
        assert replace(registry.load(path), generation=7) == FULL
