"""Tables for a person: complete, aligned, one line a model, and harmless to a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor_synapse import report
from supervisor_synapse.adapters.history import Line
from supervisor_synapse.core.model import (
    Device,
    DeviceRow,
    Failure,
    FailureClass,
    Holding,
    Phase,
    Role,
    Row,
    Tier,
)
from tests.unit.builders import GIB, MIB, gpu, program, row, taking

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def cells(text: str) -> dict[str, str]:
    """The columns of a table with one line below its head, by title."""
    head, line = text.split("\n")
    starts = [found.start() for found in re.finditer(r"(?<!\S)[A-Z]+(?: [A-Z]+)?(?!\S)", head)]
    titles = re.findall(r"(?<!\S)[A-Z]+(?: [A-Z]+)?(?!\S)", head)
    assert len(titles) == len(starts)
    return dict(zip(titles, re.split(r"\s{2,}", line.strip()), strict=False))


@contextlib.contextmanager
def terminal(columns: int = 160, **environment: str) -> Iterator[None]:
    """Standard output is a terminal of so many columns."""
    ours, theirs = pty.openpty()
    chosen = {"TERM": "xterm-256color", "COLUMNS": str(columns)} | environment
    with pytest.MonkeyPatch.context() as patch, open(theirs, "w") as stdout:
        patch.delenv("NO_COLOR", raising=False)
        for name, value in chosen.items():
            patch.setenv(name, value)
        patch.setattr(sys, "stdout", stdout)
        yield
    os.close(ours)


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [(None, "-"), (0, "0 MiB"), (34 * 1024, "34 KiB"), (MIB, "1 MiB"),
     (512 * MIB, "512 MiB"), (8 * GIB, "8192 MiB"), (10 * GIB, "10.0 GiB"),
     (79 * GIB + GIB // 2, "79.5 GiB")],
)  # fmt: skip
def test_sizes_are_shown_in_the_unit_that_one_thinks_in(size_bytes: int | None, shown: str) -> None:
    assert report.mib(size_bytes) == shown


# --- the table of models -------------------------------------------------------------------------


def test_a_models_line_says_all_of_it() -> None:
    text = report.models_table([row(slots_busy=2, slots_total=4, measured_bytes=300 * MIB)])
    assert cells(text) == {
        "NAME": "tiny-q4_k_m", "TIER": "FAST", "PHASE": "ready", "PORT": "8100",
        "CONTEXT": "4096", "DEVICE": "CPU", "MEMORY": "300 MiB", "SLOTS": "2/4",
        "REASON": "answers 1.2 s after its start",
    }  # fmt: skip


def test_what_was_not_measured_is_marked_as_an_estimate() -> None:
    assert cells(report.models_table([row(measured_bytes=None)]))["MEMORY"] == "~200 MiB"


def test_what_is_not_known_is_a_dash() -> None:
    assert cells(report.models_table([row(slots_busy=None)]))["SLOTS"] == "-/4"


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("tier", list(Tier))
def test_every_phase_and_tier_can_be_shown(phase: Phase, tier: Tier) -> None:
    """Tiers in upper case, phases in lower."""
    shown = cells(report.models_table([row(phase=phase, tier=tier)]))
    assert (shown["PHASE"], shown["TIER"]) == (phase.value, tier.value.upper())


@pytest.mark.parametrize("phase", [Phase.FAILED, Phase.BACKOFF])
def test_a_model_that_failed_shows_the_evidence(phase: Phase) -> None:
    """Nothing settles in silence."""
    failure = Failure(FailureClass.BAD_ARGUMENT, "error: invalid argument: --fast", 1.0)
    failed = row(phase=phase, reason="bad-argument", last_failure=failure)
    assert failed.explanation == "bad-argument: error: invalid argument: --fast"
    assert "error: invalid argument: --fast" in report.models_table([failed])


def test_an_earlier_failure_is_not_the_reason_of_a_model_that_runs() -> None:
    failure = Failure(FailureClass.CRASHED, "long ago", 1.0)
    assert row(last_failure=failure).explanation == "answers 1.2 s after its start"


def test_columns_are_aligned_whatever_the_names_are() -> None:
    rows = [row(name="a" * length, port=port) for length, port in ((3, 80), (63, 8100))]
    head, *lines = report.models_table(rows).split("\n")
    end = head.index("PORT") + len("PORT")
    assert [line[:end].split()[-1] for line in lines] == ["80", "8100"]


def test_a_table_has_no_blanks_at_the_end_of_a_line() -> None:
    text = report.models_table([row(reason=""), row(reason="x" * 20)])
    assert all(line == line.rstrip() for line in text.split("\n"))


def test_markup_in_a_text_stays_text() -> None:
    assert "[red]x[/red] :smile:" in report.models_table([row(reason="[red]x[/red] :smile:")])


HOSTILE = "a\x1b[2Jb\nc\td\re\x07f\x9b31mg\u202eh\u2028i\udcffj"


@pytest.mark.parametrize("field", ["name", "device", "reason"])
def test_no_text_steers_a_terminal(field: str) -> None:
    """Escapes, line breaks and what cannot be encoded are shown, not sent."""
    text = report.models_table([row(**{field: HOSTILE})])
    assert len(text.split("\n")) == 2
    assert all(line.isprintable() for line in text.split("\n"))
    assert text.encode()


@given(st.text(st.characters(), min_size=1, max_size=6))
def test_whatever_a_reason_is_each_model_has_one_line(reason: str) -> None:
    lines = report.models_table([row(reason=reason), row()]).split("\n")
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)


def test_other_scripts_are_shown_as_they_are() -> None:
    assert "模型 ready é" in report.models_table([row(reason="模型 ready é")])


# --- terminals -----------------------------------------------------------------------------------


def shown_values(one: Row) -> set[str]:
    return {
        one.name, one.tier.label, one.phase.value, str(one.port), str(one.context), one.device,
        "~200 MiB", "-/4", *one.reason.split(),
    }  # fmt: skip


@pytest.mark.parametrize("columns", [20, 60, 80, 132, 300])
@pytest.mark.parametrize("name", ["tiny", "qwen2.5-coder-7b-instruct-q4_k_m", "x" * 63])
def test_no_terminal_is_so_narrow_that_something_is_cut(columns: int, name: str) -> None:
    """A port number that lost its end is worse than a line that wraps."""
    one = row(name=name)
    with terminal(columns):
        text = _COLOUR.sub("", report.models_table([one]))
    words = set(re.split(r"\s{2,}|\n", text)) | {word.rstrip(",:") for word in text.split()}
    assert shown_values(one) <= words
    assert {"PORT", "SLOTS"} <= words


TABLES = {
    "models": lambda name, why: report.models_table([row(name=name, reason=why)] * 2),
    "plan": lambda name, why: report.plan_table([[program(name=name, reason=why)] * 2], []),
    "up": lambda name, why: report.ready_table([row(name=name, reason=why)] * 2),
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("columns", [80, 120])
def test_a_usual_name_and_a_long_reason_fit_into_a_terminal(table: str, columns: int) -> None:
    why = "does not fit: needs 22.4 GiB at context 32768, 11.9 GiB left on CUDA0, and so on"
    with terminal(columns):
        text = _COLOUR.sub("", TABLES[table]("qwen2.5-1.5b-instruct-q4_k_m", why))
    assert max(len(line.rstrip()) for line in text.split("\n")) <= columns
    assert len(re.findall(r"\bCUDA0,\s+and\s+so\s+on\b", text)) == 2


def test_in_a_narrow_terminal_the_reason_stands_under_its_model() -> None:
    with terminal(80):
        lines = _COLOUR.sub("", report.models_table([row(), row(name="b", reason="")])).split("\n")
    assert [line.split()[0] for line in lines] == ["NAME", "tiny-q4_k_m", "context", "b", "context"]
    assert lines[2] == "    context 4096, on CPU: answers 1.2 s after its start"
    assert lines[4] == "    context 4096, on CPU"


def test_in_a_narrow_terminal_a_plan_still_says_where_its_figures_are_from() -> None:
    with terminal(80):
        lines = _COLOUR.sub("", report.plan_table([[program(reason="fits")]], [])).split("\n")
    assert lines[2] == "    text, on CPU, context 4096, memory by header: fits"


def test_no_text_steers_a_narrow_terminal() -> None:
    with terminal(80):
        text = _COLOUR.sub("", report.models_table([row(reason=HOSTILE)]))
    assert len(text.split("\n")) == 3
    assert all(line.isprintable() for line in text.split("\n"))


def test_a_long_reason_folds_into_the_terminals_width() -> None:
    with terminal(120):
        text = _COLOUR.sub("", report.models_table([row(reason="word " * 40)]))
    assert text.count("word") == 40
    assert max(map(len, text.split("\n"))) <= 120


def test_a_phase_has_its_colour_in_a_terminal() -> None:
    with terminal():
        assert "\x1b[32mready" in report.models_table([row()])


def test_who_wants_no_colour_gets_none() -> None:
    with terminal(NO_COLOR="1"):
        text = report.models_table([row()])
    assert "\x1b[3" not in text


def test_there_is_no_colour_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("CLICOLOR_FORCE", "1")
    assert "\x1b" not in report.models_table([row(phase=phase) for phase in Phase])


# --- the other tables ----------------------------------------------------------------------------


def test_what_up_ends_with_says_where_the_models_answer() -> None:
    assert cells(report.ready_table([row()])) == {
        "NAME": "tiny-q4_k_m", "TIER": "FAST", "PHASE": "ready", "PORT": "8100",
        "URL": "http://127.0.0.1:8100", "REASON": "answers 1.2 s after its start",
    }  # fmt: skip


def test_what_up_ends_with_is_what_the_readme_shows() -> None:
    demo = row(name="demo-f16", reason="answered 0.6 s after its start")
    gemma = row(
        name="gemma-3-270m-q4_k_m", port=8101, url="http://127.0.0.1:8101",
        reason="answered 2.1 s after its start",
    )  # fmt: skip
    with terminal(120):
        text = _COLOUR.sub("", report.ready_table([demo, gemma]))
    readme = Path(__file__).resolve().parents[2].joinpath("README.md").read_text()
    assert "\n".join(line.rstrip() for line in text.split("\n")) in readme


def test_a_plan_shows_the_waves_and_what_stays_out() -> None:
    first, second = program(name="one"), program(name="two", tier=Tier.POWERFUL, port=8101)
    out = program(name="three", reason="does not fit: 9 GiB of 8 GiB", estimate=taking(12 * GIB))
    lines = report.plan_table([[first], [second]], [out]).split("\n")
    assert [line.split()[:3] for line in lines[1:]] == [
        ["1", "one", "FAST"], ["2", "two", "POWERFUL"], ["-", "three", "FAST"],
    ]  # fmt: skip
    assert "does not fit: 9 GiB of 8 GiB" in lines[3]
    assert "12.0 GiB" in lines[3]
    assert all(word in lines[1].split() for word in ("text", "CPU", "4096", "header", "8100"))


def test_an_empty_plan_is_a_head_alone() -> None:
    assert report.plan_table([], []).split()[:2] == ["WAVE", "NAME"]


def test_devices_are_shown_with_what_is_free() -> None:
    card = Device("CUDA0", 80 * GIB, 79 * GIB, "NVIDIA H100")
    lines = report.devices_table([card, gpu("Vulkan1", 8 * GIB, 512 * MIB)]).split("\n")
    assert re.split(r"\s{2,}", lines[1]) == ["CUDA0", "80.0 GiB", "79.0 GiB", "NVIDIA H100"]
    assert re.split(r"\s{2,}", lines[2]) == ["Vulkan1", "8192 MiB", "512 MiB"]


# --- a line to paste -----------------------------------------------------------------------------


def test_what_is_tried_first_is_ready_and_talks_where_one_does() -> None:
    loading = row(name="loading", phase=Phase.LOADING)
    ranks, talks = row(name="ranks", role=Role.RERANKER), row(name="talks", role=Role.VISION)
    assert report.example([loading, ranks, talks, row()]) == talks
    assert report.example([loading, ranks]) == ranks
    assert report.example([loading]) is None


@pytest.mark.parametrize(
    ("role", "path", "keys"),
    [(Role.TEXT, "/v1/chat/completions", {"messages", "max_tokens"}),
     (Role.VISION, "/v1/chat/completions", {"messages", "max_tokens"}),
     (Role.DRAFT, "/v1/chat/completions", {"messages", "max_tokens"}),
     (Role.EMBEDDING, "/v1/embeddings", {"input"}),
     (Role.RERANKER, "/v1/rerank", {"query", "documents"})],
)  # fmt: skip
def test_a_curl_line_asks_what_the_model_is_for(role: Role, path: str, keys: set[str]) -> None:
    words = shlex.split(report.curl_line(row(role=role)))
    assert words[0] == "curl"
    assert f"http://127.0.0.1:8100{path}" in words
    body = json.loads(words[words.index("-d") + 1])
    assert body["model"] == "tiny"
    assert set(body) == keys | {"model"}


@given(st.text(max_size=40))
def test_an_alias_cannot_leave_its_quotes(alias: str) -> None:
    """The line is pasted into a shell."""
    line = report.curl_line(row(alias=alias))
    words = shlex.split(line)
    assert len(words) == 7
    assert json.loads(words[-1])["model"] == alias
    assert line.isprintable()


# --- what would change in a block ----------------------------------------------------------------

COMMAND = (
    "/opt/bin/synapse-run --name tiny --drain-seconds 30 -- /opt/llama-server "
    "--model /m/tiny.gguf --ctx-size 4096 --no-mmap"
)
BLOCK = f"""; tiny: as configured
[program:tiny]
command={COMMAND}
priority=10
environment=A="1"
"""


def diff(*replaced: tuple[str, str], before: str = BLOCK) -> list[str]:
    """The lines below the head."""
    after = before
    for old, new in replaced:
        assert old in after
        after = after.replace(old, new)
    head, *lines = report.block_diff("tiny", before, after).split("\n")
    assert head == "~ tiny"
    return lines


def test_of_a_changed_command_only_the_words_that_differ_are_shown() -> None:
    assert diff(("4096 --no-mmap", "8192 --flash-attn on")) == [
        "    --ctx-size 4096 -> 8192",
        "    - --no-mmap",
        "    + --flash-attn on",
    ]


def test_the_launchers_words_and_the_programs_are_shown_too() -> None:
    changed = diff(
        ("/opt/bin/", "/usr/bin/"), ("seconds 30", "seconds 60"),
        ("/opt/llama", "/opt/new build/llama"),
    )  # fmt: skip
    assert changed == [
        "    /opt/bin/synapse-run -> /usr/bin/synapse-run",
        "    --drain-seconds 30 -> 60",
        "    /opt/llama-server -> /opt/new build/llama-server",
    ]


def test_a_flag_of_the_launcher_is_not_taken_for_the_engines() -> None:
    assert diff(("--no-mmap", "--no-mmap --name x")) == ["    + --name x"]


def test_a_flag_that_stands_there_several_times_is_compared_one_by_one() -> None:
    before = BLOCK.replace("--no-mmap", "--lora a --lora b --lora b")
    assert diff(("--lora a", "--lora c"), before=before) == ["    --lora a -> c"]
    assert diff(("--lora b --lora b", "--lora b"), before=before) == ["    - --lora b"]
    assert diff(("--lora a --lora b", "--lora b --lora a"), before=before) == [
        "    command: the same words, in another order or layout"
    ]


def test_a_value_that_begins_with_a_dash_and_a_percent_are_shown_as_meant() -> None:
    assert diff(("--no-mmap", "--no-mmap --gpu-layers -1 --alias 50%%")) == [
        "    + --gpu-layers -1", "    + --alias 50%",
    ]  # fmt: skip


def test_other_keys_are_shown_with_both_values() -> None:
    assert diff(("priority=10", "priority=20\nuser=me"), ('environment=A="1"\n', "")) == [
        "    priority: 10 -> 20",
        '    - environment: A="1"',
        "    + user: me",
    ]


def test_where_only_comments_differ_it_says_so() -> None:
    assert diff(("as configured", "context 2048")) == ["    comments or layout only"]
    assert diff(("priority=10", "priority = 10 ; first")) == ["    comments or layout only"]


def test_what_comes_and_what_goes_is_named() -> None:
    """A whole block of each of many would hide what changes in others."""
    assert report.block_diff("tiny", None, BLOCK) == "+ tiny"
    assert report.block_diff("tiny", BLOCK, None) == "- tiny"


def test_where_nothing_differs_nothing_is_said() -> None:
    assert report.block_diff("tiny", BLOCK, BLOCK) == ""
    assert report.block_diff("tiny", None, None) == ""


def test_a_section_of_a_persons_own_is_named() -> None:
    changed = diff(('environment=A="1"', 'environment=A="1"\n[program:other]\ncommand=/bin/cat'))
    assert changed == ["    + [program:other]", "    + [program:other] command: /bin/cat"]


def test_a_block_that_a_person_broke_is_shown_too() -> None:
    lines = diff(("--no-mmap", "--no-mmap 'open"))
    assert "'open" in "".join(lines)


@given(st.text(max_size=80), st.text(max_size=80))
def test_no_block_can_steer_the_terminal(before: str, after: str) -> None:
    said = report.block_diff("tiny", before, f"[program:tiny]\ncommand={after}")
    assert said.replace("\n", "").isprintable()


def test_a_diff_is_coloured_on_a_terminal_only() -> None:
    after = BLOCK.replace("4096", "8192").replace(" --no-mmap", "")
    plain = report.block_diff("tiny", BLOCK, after)
    with terminal(40):
        coloured = report.block_diff("tiny", BLOCK, after)
    assert "\x1b" not in plain
    assert _COLOUR.search(coloured)
    assert _COLOUR.sub("", coloured) == plain
    with terminal(NO_COLOR="1"):
        assert report.block_diff("tiny", BLOCK, after) == plain


# --- bars of memory ------------------------------------------------------------------------------


def card(*models: Holding, **changes: object) -> DeviceRow:
    values: dict[str, object] = {
        "name": "CUDA0", "description": "NVIDIA H100", "total_bytes": 80 * GIB,
        "free_bytes": 30 * GIB, "reserve_bytes": GIB, "room_bytes": 27 * GIB,
        "others_bytes": 10 * GIB,
    }  # fmt: skip
    return DeviceRow(**(values | changes | {"models": models}))  # type: ignore[arg-type]


BUSY = card(Holding("qwen2.5-14b-instruct-q4_k_m", 38 * GIB, 40 * GIB), Holding("b", 0, 2 * GIB))


def test_a_device_has_a_bar_numbers_and_a_line_for_each_who_has_of_it() -> None:
    bar, description, *legend = report.memory_bars([BUSY]).split("\n")
    found = re.fullmatch(r"CUDA0  \[(#+)(=+)(x+)(\.+)(\|)\]  80\.0 GiB, 27\.0 GiB left", bar)
    assert found is not None
    assert sum(map(len, found.groups())) == 72
    assert len(found[1]) == round(72 * 38 / 80)
    assert description == "    NVIDIA H100"
    assert [re.split(r"\s{2,}", line.strip()) for line in legend] == [
        ["#=", "qwen2.5-14b-instruct-q4_k_m", "38.0 GiB, 2048 MiB to come"],
        ["=", "b", "2048 MiB to come"], ["x", "others", "10.0 GiB"],
        [".", "free", "27.0 GiB"], ["|", "reserve", "1024 MiB"],
    ]  # fmt: skip


def test_a_device_whose_reader_does_not_answer_shows_why() -> None:
    silent = card(free_bytes=None, room_bytes=None, others_bytes=None, problem="no driver")
    lines = report.memory_bars([silent]).split("\n")
    assert re.fullmatch(r"CUDA0  \[\?+\|\]  80\.0 GiB, left: not known", lines[0])
    assert "    does not answer: no driver" in lines


def test_bars_of_several_devices_begin_below_each_other() -> None:
    text = report.memory_bars([card(name="CPU"), card(name="Vulkan10")])
    starts = {line.index("[") for line in text.split("\n") if "[" in line}
    assert len(starts) == 1


@pytest.mark.parametrize("columns", [40, 60, 80, 132, 300])
def test_a_bar_fits_the_terminal(columns: int) -> None:
    with terminal(columns):
        lines = _COLOUR.sub("", report.memory_bars([BUSY, card(problem="no " * 50)])).split("\n")
    assert max(map(len, lines)) <= max(columns, 64)  # the longest name needs as much
    bars = [line for line in lines if "[" in line]
    assert len(bars) == 2
    assert all(15 < len(bar) <= columns for bar in bars)


def test_neighbours_in_a_bar_have_colours_of_their_own() -> None:
    with terminal():
        bar = report.memory_bars([card(Holding("a", GIB, GIB), Holding("b", GIB, GIB))])
    assert re.search(r"\x1b\[32m#+\x1b\[0m\x1b\[36m#+\x1b\[0m\x1b\[35mx+", bar)


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_who_wants_no_colour_gets_no_escape_at_all(environment: dict[str, str]) -> None:
    with terminal(100, **environment):
        texts = [report.memory_bars([BUSY]), report.models_table([row()]),
                 report.history_table([CHANGE])]  # fmt: skip
    assert all("\x1b" not in text for text in texts)


def test_a_dumb_terminal_is_as_wide_as_it_is() -> None:
    with terminal(200, TERM="dumb"):
        text = report.models_table([row(reason="word " * 20)])
    assert len(text.split("\n")) == 2
    assert text.count("word") == 20


@pytest.mark.parametrize("field", ["name", "description", "problem"])
def test_no_text_of_a_device_steers_a_terminal(field: str) -> None:
    text = report.memory_bars([card(Holding(HOSTILE, GIB, GIB), **{field: HOSTILE})])
    assert all(line.isprintable() for line in text.split("\n"))


# --- the history ---------------------------------------------------------------------------------

CHANGE = Line(
    1_800_000_000.0, "tiny", "loading", "failed", "bad-argument", failure_class="bad-argument",
    evidence="error: --fast",
)  # fmt: skip


def test_a_transition_tells_when_from_where_to_where_and_why() -> None:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(CHANGE.at))
    assert cells(report.history_table([CHANGE])) == {
        "WHEN": when, "MODEL": "tiny", "CHANGE": "loading -> failed", "CLASS": "bad-argument",
        "WHY": "bad-argument: error: --fast",
    }  # fmt: skip


def test_evidence_that_the_reason_holds_already_is_not_said_twice() -> None:
    line = Line(1.0, "tiny", None, "failed", "x: error: --fast", evidence="error: --fast")
    text = report.history_table([line])
    assert text.count("error: --fast") == 1
    assert "- -> failed" in text


def test_the_class_is_not_said_twice() -> None:
    line = Line(1.0, "tiny", None, "failed", "crashed: signal 9", failure_class="crashed")
    assert cells(report.history_table([line]))["WHY"] == "signal 9"


@pytest.mark.parametrize("at", [1e300, -1e300, float("nan"), float("inf")])
def test_a_time_that_is_none_is_a_dash(at: float) -> None:
    assert report.history_table([Line(at, "tiny", None, "a", "b")]).split("\n")[1][0] == "-"


def test_no_text_of_the_history_steers_a_terminal() -> None:
    line = Line(1.0, HOSTILE, HOSTILE, HOSTILE, HOSTILE, None, None, HOSTILE, HOSTILE)
    lines = report.history_table([line]).split("\n")
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)


def test_without_a_terminal_each_row_is_one_line() -> None:
    """For whoever filters lines."""
    text = report.models_table([row(reason="word " * 200)])
    assert len(text.split("\n")) == 2
