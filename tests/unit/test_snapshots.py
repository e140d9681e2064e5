"""The listener's snapshot as text: nothing is lost on the way, nothing odd comes back."""

from __future__ import annotations

import json
import xmlrpc.client
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor_synapse.adapters import snapshots
from supervisor_synapse.core.model import (
    Breaker,
    DeviceRow,
    Failure,
    FailureClass,
    Holding,
    ListenerRow,
    Phase,
    ProcessState,
    Role,
    Row,
    Snapshot,
    Tier,
    Usage,
)
from supervisor_synapse.errors import TransientError
from tests.unit.builders import MIB, row

CONTRACT = {
    "name", "repo", "file", "tier", "enabled", "phase", "state", "pid", "port", "url", "alias",
    "context", "parallel", "device", "memory", "slots", "restarts", "ready_seconds", "generation",
    "trial", "last_failure", "next_retry_in",
}  # fmt: skip

COUNTS = st.integers(0, 2**50)
SECONDS = st.floats(0, 1e12, allow_nan=False)
# As os.fsdecode gives it for names that are no UTF-8, too.
TEXTS = st.text() | st.binary().map(lambda raw: raw.decode("utf-8", "surrogateescape"))
ROWS = st.builds(
    Row,
    name=TEXTS, repo=st.none() | TEXTS, file=TEXTS, tier=st.sampled_from(Tier),
    role=st.sampled_from(Role), enabled=st.booleans(), phase=st.sampled_from(Phase),
    reason=TEXTS, state=st.sampled_from(ProcessState), pid=st.integers(0, 2**22),
    port=st.integers(1, 65535), url=TEXTS, alias=TEXTS, context=st.integers(0, 2**31),
    parallel=st.integers(1, 64), device=TEXTS, estimated_bytes=st.integers(0, 2**50),
    estimate_source=TEXTS, measured_bytes=st.none() | st.integers(0, 2**50),
    slots_busy=st.none() | st.integers(0, 64), slots_total=st.integers(0, 64),
    restarts=st.integers(0, 2**40), ready_seconds=st.none() | SECONDS,
    generation=st.integers(0, 2**40), trial=st.booleans(),
    last_failure=st.none()
    | st.builds(Failure, st.sampled_from(FailureClass), message=TEXTS, at=SECONDS),
    next_retry_seconds=st.none() | SECONDS,
    started_at=st.none() | st.integers(0, 2**40), breaker=st.sampled_from(Breaker),
    failures=st.dictionaries(TEXTS, st.integers(1, 2**40)).map(lambda one: tuple(one.items())),
    usage=st.builds(
        Usage, queued=st.none() | COUNTS, prompt_tokens=st.none() | COUNTS,
        generated_tokens=st.none() | COUNTS, probe_seconds=st.none() | SECONDS,
        is_asleep=st.booleans(),
    ),
)  # fmt: skip
DEVICES = st.builds(
    DeviceRow,
    name=TEXTS, description=TEXTS, total_bytes=COUNTS, free_bytes=st.none() | COUNTS,
    reserve_bytes=COUNTS, room_bytes=st.none() | st.integers(-(2**50), 2**50),
    others_bytes=st.none() | COUNTS, problem=TEXTS,
    models=st.lists(
        st.builds(Holding, model=TEXTS, held_bytes=st.none() | COUNTS, committed_bytes=COUNTS),
        max_size=3,
    ).map(tuple),
)  # fmt: skip
LISTENERS = st.none() | st.builds(
    ListenerRow, pid=st.integers(1, 2**22), version=TEXTS, started_at=SECONDS,
    turn_seconds=SECONDS, lag_seconds=SECONDS,
)  # fmt: skip


def public(**changes: Any) -> dict[str, Any]:
    """One object of `models --json`."""
    (item,) = snapshots.public([row(**changes)])
    return item


def text_of(at: Any = 1.0, **changes: Any) -> str:
    """The text of a snapshot with one model, of which `changes` are not as they should be."""
    return json.dumps({"at": at, "models": [public() | changes]})


@given(st.lists(ROWS, max_size=3), SECONDS, st.lists(DEVICES, max_size=2), LISTENERS)
def test_what_was_dumped_comes_back(
    rows: list[Row], at: float, devices: list[DeviceRow], listener: ListenerRow | None
) -> None:
    snapshot = Snapshot(at, tuple(rows), tuple(devices), listener)
    assert snapshots.load(snapshots.dump(snapshot)) == snapshot


@given(ROWS)
def test_the_text_survives_xml_rpc(one: Row) -> None:
    """ASCII, and no character that XML knows none of."""
    text = snapshots.dump(Snapshot(1.0, (one,)))
    assert text.isascii()
    (back,), _ = xmlrpc.client.loads(xmlrpc.client.dumps((text,), methodresponse=True))
    assert back == text


def test_a_model_has_the_fields_of_the_contract() -> None:
    item = public()
    assert set(item) >= CONTRACT
    assert set(item["memory"]) == {"estimated", "source", "measured"}
    assert set(item["slots"]) == {"busy", "total"}


def test_a_model_is_shown_in_the_words_of_the_contract() -> None:
    """Tiers in upper case, phases in lower, supervisord's states as it calls them."""
    item = public(
        tier=Tier.BALANCED, phase=Phase.BACKOFF, state=ProcessState.EXITED, pid=0,
        estimated_bytes=5 * 2**40, measured_bytes=MIB, next_retry_seconds=2.5,
        last_failure=Failure(FailureClass.OUT_OF_MEMORY, "no room", 17.0),
    )  # fmt: skip
    assert item["tier"] == "BALANCED"
    assert item["phase"] == "backoff"
    assert item["state"] == "EXITED"
    assert item["memory"] == {"estimated": 5 * 2**40, "source": "header", "measured": MIB}
    assert item["next_retry_in"] == 2.5
    assert item["last_failure"] == {"class": "out-of-memory", "message": "no room", "at": 17.0}


def test_an_absence_is_null() -> None:
    item = public(repo=None, measured_bytes=None, slots_busy=None, ready_seconds=None)
    assert item["repo"] is item["memory"]["measured"] is item["slots"]["busy"] is None
    assert item["ready_seconds"] is item["last_failure"] is item["next_retry_in"] is None


def test_what_an_older_listener_does_not_say_is_not_missed() -> None:
    item = public()
    for key in ("started_at", "breaker", "failures", "usage"):
        del item[key]
    assert snapshots.load(json.dumps({"at": 1.0, "models": [item]})) == Snapshot(1.0, (row(),))


def test_what_a_newer_listener_says_beside_is_passed_over() -> None:
    text = json.dumps({"at": 1.0, "later": {}, "models": [public() | {"later": [1]}]})
    assert snapshots.load(text) == Snapshot(1.0, (row(),))


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{}", '""', "1", "{", "\ud800", '{"at": 1}', '{"models": []}',
     '{"at": null, "models": []}', '{"at": "x", "models": []}', '{"at": 1, "models": null}',
     '{"at": 1, "models": [[]]}', '{"at": 1, "models": [{}]}', '{"at": 1, "models": "abc"}',
     '{"at": NaN, "models": []}', '{"at": 1e999, "models": []}', '{"at": -Infinity, "models": []}',
     '{"at": ' + "9" * 400 + ', "models": []}', '{"at": ' + "9" * 9999 + ', "models": []}',
     "[" * 100_000, '{"a":' * 100_000],
    ids=lambda text: ascii(text[:30]),
)  # fmt: skip
def test_what_is_no_snapshot_is_refused_in_a_line(text: str) -> None:
    with pytest.raises(TransientError, match="cannot read the listener's snapshot") as caught:
        snapshots.load(text)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("field", "value"),
    [("tier", "HUGE"), ("tier", None), ("phase", "happy"), ("state", "BUSY"), ("state", 20),
     ("port", "x"), ("pid", None), ("name", None), ("memory", None), ("memory", {}),
     ("slots", []), ("enabled", "maybe"), ("last_failure", {}), ("last_failure", "x"),
     ("last_failure", {"class": "bored", "message": "", "at": 1}), ("ready_seconds", "x"),
     ("ready_seconds", float("nan")), ("role", "poet")],
)  # fmt: skip
def test_a_model_that_is_none_is_refused(field: str, value: object) -> None:
    with pytest.raises(TransientError):
        snapshots.load(text_of(**{field: value}))


@pytest.mark.parametrize("field", sorted(CONTRACT))
def test_a_model_that_lacks_a_field_is_refused(field: str) -> None:
    item = public()
    del item[field]
    with pytest.raises(TransientError):
        snapshots.load(json.dumps({"at": 1.0, "models": [item]}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
)


@given(st.sampled_from(sorted(CONTRACT)), JSON)
def test_whatever_stands_in_a_field_it_is_read_or_refused(field: str, value: object) -> None:
    try:
        snapshot = snapshots.load(text_of(**{field: value}))
    except TransientError:
        return
    assert snapshots.load(snapshots.dump(snapshot)) == snapshot
    json.loads(snapshots.dump(snapshot), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("text", "age"),
    [('{"age_seconds": 2.5}', 2.5), ('{"age_seconds": 0}', 0.0), ("{}", None), ("[]", None),
     ('{"age_seconds": null}', None), ('{"age_seconds": "1"}', None), ("", None),
     ('{"age_seconds": NaN}', None), ('{"age_seconds": ' + "9" * 400 + "}", None),
     ("[" * 100_000, None)],
    ids=lambda value: ascii(value)[:30],
)  # fmt: skip
def test_the_age_of_a_snapshot_is_what_the_plugin_says(text: str, age: float | None) -> None:
    assert snapshots.age_seconds(text) == age
