"""What a word of a request means, and what becomes of the request."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor_synapse.adapters.haproxy import map_text
from supervisor_synapse.core.gateway import Tables, Upstream, Verdict, tables, verdict
from supervisor_synapse.core.model import Phase, Program, Tier
from tests.unit.builders import program, row

SERVE, HOLD, DEMAND = Verdict("serve"), Verdict("hold"), Verdict("demand")
REFUSE = Verdict("refuse", "stopped: by hand")


def told(*programs: Program, **verdicts: Verdict) -> Tables:
    """The maps, where all serve but those named."""
    rows = [row(name=one.name, alias=one.alias, repo=one.repo) for one in programs]
    return tables(programs, rows, {one.name: verdicts.get(one.name, SERVE) for one in programs})


def named(name: str, **changes: object) -> Program:
    return program(**{"name": name, "alias": name, "repo": f"acme/{name}", **changes})


# --- routes --------------------------------------------------------------------------------------


def test_a_model_is_reached_by_its_name_its_alias_its_repo_and_its_tier() -> None:
    found = told(named("tiny-q4", alias="Tiny", repo="Acme/Tiny-GGUF", tier=Tier.POWERFUL))
    assert found.routes == dict.fromkeys(
        ["tiny-q4", "Tiny", "tiny", "Acme/Tiny-GGUF", "powerful"], "tiny-q4"
    )


def test_a_name_always_means_its_own_model() -> None:
    """Whatever others call themselves, and however badly it does."""
    found = told(
        named("a"), named("b", alias="a", repo="a", priority=0), named("fast", tier=Tier.POWERFUL),
        a=REFUSE,
    )  # fmt: skip
    assert (found.routes["a"], found.routes["b"], found.routes["fast"]) == ("a", "b", "fast")


@pytest.mark.parametrize(
    ("first", "second", "best"),
    [
        (SERVE, SERVE, "a"), (HOLD, SERVE, "b"), (DEMAND, HOLD, "b"), (REFUSE, DEMAND, "b"),
        (SERVE, HOLD, "a"), (REFUSE, REFUSE, "a"), (Verdict("serve", "x"), SERVE, "a"),
    ],
)  # fmt: skip
def test_a_word_that_several_have_means_the_one_that_is_nearest_to_serving(
    first: Verdict, second: Verdict, best: str
) -> None:
    one, two = named("a", alias="chat", priority=1), named("b", alias="chat", priority=2)
    assert told(one, two, a=first, b=second).routes["chat"] == best
    assert told(two, one, a=first, b=second).routes["chat"] == best


def test_among_equals_priority_decides_and_then_the_name() -> None:
    models = [named("c", alias="x", priority=2), named("b", alias="x", priority=1),
              named("a", alias="x", priority=2)]  # fmt: skip
    assert told(*models).routes["x"] == "b"
    assert told(models[0], models[2]).routes["x"] == "a"


def test_a_tier_does_not_mean_a_model_that_would_only_refuse() -> None:
    assert told(named("a"), named("b"), a=REFUSE).routes["fast"] == "b"
    assert "fast" not in told(named("a"), a=REFUSE).routes


def test_a_model_that_is_called_like_a_tier_takes_that_word() -> None:
    assert told(named("a", priority=0), named("fast")).routes["fast"] == "fast"


def test_an_alias_like_a_tier_is_an_alias() -> None:
    """It was said by somebody; the tier is ours."""
    found = told(named("a"), named("b", alias="fast", tier=Tier.BALANCED))
    assert found.routes["fast"] == "b"


@pytest.mark.parametrize(
    "word",
    ["", " ", "two words", "tab\there", "line\nbreak", "a\r", "#comment", "*1", "=a", "-x", "ä",
     "a\0b", "x" * 301, "<<", '"q"', "a;b", "\u2028"],
)  # fmt: skip
def test_words_that_could_break_a_map_are_in_none(word: str) -> None:
    found = told(named("a", alias=word, repo=word))
    assert set(found.routes) == {"a", "fast"}


def test_what_is_not_shown_yet_is_not_told_of() -> None:
    """A program of which the listener has no row, and a row whose program is gone."""
    known, unknown = named("a"), named("b")
    found = tables([known, unknown], [row(name="a"), row(name="gone")], {"a": SERVE, "gone": SERVE})
    assert set(found.routes.values()) == {"a"}
    assert listed(found) == ["a"]


# --- verdicts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "kind"),
    [
        (Phase.READY, "serve"), (Phase.LOADING, "hold"), (Phase.PENDING, "hold"),
        (Phase.UNHEALTHY, "avoid"), (Phase.BACKOFF, "hold"), (Phase.DRAINING, "hold"),
        (Phase.STOPPING, "hold"), (Phase.VERIFYING, "hold"), (Phase.DEFERRED, "demand"),
        (Phase.STOPPED, "refuse"), (Phase.DISABLED, "refuse"), (Phase.FAILED, "refuse"),
    ],
)  # fmt: skip
def test_each_phase_has_its_verdict(phase: Phase, kind: str) -> None:
    found = verdict(row(phase=phase, reason="so it is"), has_way_back=False)
    assert found.kind == kind
    assert (found.word == f"{phase.value}: so it is") is (kind == "refuse")


def test_every_phase_has_a_verdict_that_a_map_can_hold() -> None:
    for phase in Phase:
        for has_way_back in (True, False):
            found = verdict(row(phase=phase, reason=""), has_way_back=has_way_back)
            assert re.fullmatch(r"(serve|hold|avoid|demand|refuse [a-z]+)", str(found))


def test_what_was_stopped_and_comes_back_by_itself_may_be_asked_for() -> None:
    assert verdict(row(phase=Phase.STOPPED), has_way_back=True) == DEMAND


def test_who_serves_in_its_place_is_told() -> None:
    assert str(verdict(row(), has_way_back=False, fallback="small")) == "serve small"


@given(st.text())
def test_a_reason_is_one_line_of_plain_characters(reason: str) -> None:
    said = str(verdict(row(phase=Phase.FAILED, reason=reason), has_way_back=False))
    assert said.isascii()
    assert said.isprintable()
    assert len(said) < 400


# --- the list ------------------------------------------------------------------------------------


def listed(found: Tables) -> list[str]:
    """The programs in the order of /v1/models."""
    numbers = range(1, 1 + sum(key.startswith("*") for key in found.models))
    return [found.models[f"*{number}"] for number in numbers]


def test_the_list_has_every_model_in_its_order_as_openai_shows_them_and_with_its_state() -> None:
    found = told(named("b"), named("a", alias="chat", repo=None), a=REFUSE)
    assert listed(found) == ["b", "a"]
    shown = json.loads(found.models["=a"])
    assert shown == {
        "id": "a", "object": "model", "created": 0, "owned_by": "local", "aliases": ["chat"],
        "tier": "fast", "phase": "ready", "context": 4096,
    }  # fmt: skip
    assert json.loads(found.models["=b"])["owned_by"] == "acme"
    assert json.loads(found.models["=b"])["aliases"] == ["acme/b", "fast"]


def test_two_hundred_models_make_no_line_that_haproxy_could_not_read() -> None:
    """It reads lines of up to 16 KiB."""
    names = [f"{number:03}-{'x' * 59}" for number in range(200)]
    found = told(*[named(name, repo="o" * 60 + f"/{name}") for name in names])
    assert max(map(len, map_text(found.models).splitlines())) < 2000
    assert listed(found) == names


# --- whatever comes ------------------------------------------------------------------------------

NAMES = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True)
WORDS = st.one_of(st.text(), NAMES, st.sampled_from(["fast", "FAST", "a/b", "*1", "=a"]))
VERDICTS = st.one_of(
    st.sampled_from([SERVE, HOLD, DEMAND]),
    st.builds(lambda text: verdict(row(phase=Phase.FAILED, reason=text), has_way_back=False),
              st.text()),
)  # fmt: skip


@st.composite
def fleets(draw: st.DrawFn) -> tuple[list[Program], dict[str, Verdict]]:
    names = draw(st.lists(NAMES, unique=True, max_size=6))
    models = [
        named(
            name, alias=draw(WORDS), repo=draw(st.one_of(st.none(), WORDS)),
            tier=draw(st.sampled_from(Tier)), priority=draw(st.integers(0, 3)),
        )
        for name in names
    ]  # fmt: skip
    return models, {name: draw(VERDICTS) for name in names}


@settings(deadline=None)
@given(fleets())
def test_whatever_models_are_called_a_name_means_itself_and_no_line_breaks(
    fleet: tuple[list[Program], dict[str, Verdict]],
) -> None:
    models, verdicts = fleet
    found = told(*models, **verdicts)
    for one in models:
        assert found.routes[one.name] == one.name
        assert found.models[one.name] == str(verdicts[one.name])
    assert set(found.routes.values()) <= {one.name for one in models}
    for entries in (found.routes, found.models):
        lines = map_text(entries).splitlines()
        assert len(lines) == len(entries)
        for (key, value), line in zip(entries.items(), lines, strict=True):
            assert line == f"{key} {value}"
            assert line.isascii()
            assert " " not in key
            assert not line.startswith("#")
            assert value == value.strip() != ""


@settings(deadline=None)
@given(fleets())
def test_the_order_in_which_models_are_known_decides_nothing(
    fleet: tuple[list[Program], dict[str, Verdict]],
) -> None:
    models, verdicts = fleet
    assert told(*models, **verdicts).routes == told(*reversed(models), **verdicts).routes


@pytest.mark.parametrize(
    ("host", "address"), [("127.0.0.1", "127.0.0.1:8100"), ("::1", "[::1]:8100")]
)
def test_an_address_is_written_as_haproxy_reads_it(host: str, address: str) -> None:
    assert Upstream("a", host, 8100).address == address


def test_what_changes_only_figures_changes_no_table() -> None:
    """Else every request would have the maps replaced."""
    one = named("a")
    before = tables([one], [row(name="a")], {"a": SERVE})
    busy = replace(row(name="a"), slots_busy=3, restarts=7, measured_bytes=5)
    assert tables([one], [busy], {"a": SERVE}) == before
