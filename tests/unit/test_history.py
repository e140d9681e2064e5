"""The history: one line for each transition, for good."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor_synapse.adapters import history
from supervisor_synapse.adapters.history import Line
from tests.unit.test_store import full_disk

READY = Line(17.25, "tiny", "loading", "ready", "answered 1.2 s after its start")


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text("ascii").split("\n") if line]


def test_a_transition_says_when_what_from_to_why_and_with_what_evidence(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    line = Line(
        17.25, "tiny", "loading", "failed", "a retry cannot help", pid=7, started=99,
        failure_class="bad-argument", evidence="error: x",
    )  # fmt: skip
    history.append(path, [line])
    assert read(path) == [
        {
            "when": 17.25, "model": "tiny", "incarnation": {"pid": 7, "started": 99},
            "from": "loading", "to": "failed", "reason": "a retry cannot help",
            "class": "bad-argument", "evidence": "error: x",
        }
    ]  # fmt: skip


def test_the_first_transition_of_a_model_comes_from_nowhere(tmp_path: Path) -> None:
    history.append(tmp_path / "h", [Line(1.0, "tiny", None, "pending", "enabled")])
    assert read(tmp_path / "h")[0]["from"] is None


def test_the_newest_line_is_the_last(tmp_path: Path) -> None:
    history.append(tmp_path / "h", [Line(n, "m", None, "ready", "") for n in (1.0, 2.0)])
    history.append(tmp_path / "h", [Line(3.0, "m", None, "ready", "")])
    assert [line["when"] for line in read(tmp_path / "h")] == [1.0, 2.0, 3.0]


def test_the_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    """Reasons and evidence quote logs."""
    history.append(tmp_path / "h", [READY])
    assert stat.S_IMODE((tmp_path / "h").stat().st_mode) == 0o600


TEXTS = st.text() | st.binary().map(lambda raw: raw.decode("utf-8", "surrogateescape"))


@given(model=TEXTS, reason=TEXTS, evidence=TEXTS)
def test_whatever_is_quoted_stays_in_its_line(
    tmp_path_factory: pytest.TempPathFactory, model: str, reason: str, evidence: str
) -> None:
    path = tmp_path_factory.mktemp("h") / "h"
    history.append(path, [Line(1.0, model, None, "failed", reason, evidence=evidence), READY])
    first, second = read(path)
    assert (first["model"], first["reason"], first["evidence"]) == (model, reason, evidence)
    assert second["to"] == "ready"


def test_a_large_file_is_put_aside_and_only_one_is_kept(tmp_path: Path) -> None:
    path, aside = tmp_path / "h", tmp_path / "h.1"
    aside.write_text("older")
    path.write_text("x\n")
    os.truncate(path, 11 * 1024 * 1024)
    history.append(path, [READY])
    assert len(read(path)) == 1
    assert aside.stat().st_size == 11 * 1024 * 1024
    assert sorted(os.listdir(tmp_path)) == ["h", "h.1"]


def test_a_full_disk_is_an_error_and_costs_only_the_torn_line(tmp_path: Path) -> None:
    """The line that comes after it is whole again: what is torn is not glued to it."""
    path = tmp_path / "h"
    history.append(path, [READY])
    with full_disk(path.stat().st_size + 10), pytest.raises(OSError, match="large"):
        history.append(path, [READY])
    history.append(path, [READY, READY])
    whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line)["to"] for line in whole] == ["ready"] * 3


def test_a_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        history.append(tmp_path / "gone" / "h", [READY])


def test_the_newest_lines_are_read_back_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    lines = [Line(float(number), "tiny", None, "ready", "x") for number in range(20)]
    history.append(path, lines)
    assert history.recent(path, 3) == [history.public(line) for line in lines[-3:]]


def test_a_torn_line_or_one_that_is_none_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history.append(path, [READY])
    with path.open("a") as file:
        file.write('[]\n{"model": 1}\n{"model": "tiny", "wh')
    assert history.recent(path, 10) == [history.public(READY)]


def test_of_a_long_history_only_the_end_is_read(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history.append(path, [Line(float(n), "tiny", None, "ready", "x" * 1000) for n in range(2000)])
    found = history.recent(path, 5000)
    assert 400 < len(found) < 600
    assert found[-1]["when"] == 1999.0


def test_where_there_is_no_history_nothing_is_read(tmp_path: Path) -> None:
    assert history.recent(tmp_path / "history.jsonl", 10) == []
