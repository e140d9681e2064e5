"""What is found where a server ended without a word."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from supervisor_synapse.adapters import damage
from supervisor_synapse.core.failures import Ending, classify
from supervisor_synapse.core.model import FailureClass
from tests.gguf_factory import write_model

START = "synapse-run: start: pid=7, at=2026-01-31T12:00:00Z\n"
END = "synapse-run: ended by itself: server=exit 1, seconds=0.25\n"


def test_a_sound_model_has_no_damage(tmp_path: Path) -> None:
    assert damage.find([str(write_model(tmp_path / "a.gguf"))]) == ""
    assert damage.find([]) == ""


@pytest.mark.parametrize("how", ["cut", "nonsense", "gone"])
def test_the_file_and_what_is_wrong_are_named(tmp_path: Path, how: str) -> None:
    """Also where it is the second of two."""
    sound = write_model(tmp_path / "a.gguf")
    broken = write_model(tmp_path / "b\n.gguf")
    match how:
        case "cut":
            os.truncate(broken, broken.stat().st_size - 1)
        case "nonsense":
            broken.write_bytes(b"<html>" + broken.read_bytes())
        case _:
            broken.unlink()
    said = damage.find([str(sound), str(broken)])
    assert "b\\n.gguf" in said
    assert "cannot read header" in said
    assert "\n" not in said


def test_the_readers_tables_stay_out_of_the_process_that_asks() -> None:
    script = (
        "import sys; from supervisor_synapse.adapters import damage; damage.find(['/nowhere']);"
        "assert 'gguf' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("log", "wordless"),
    [
        ("", True), (START, True), (START + END, True), (f"\n{START}\n{END}", True),
        (f"{START}0.01 E failed to read magic\n{END}", False),
        (f"{START}words of an earlier run\n{START}{END}", True),
        ("words, and their start no longer in sight\n" + END, False),
    ],
)  # fmt: skip
def test_only_the_servers_own_words_of_its_last_run_count(log: str, wordless: bool) -> None:
    assert Ending(1, log).is_wordless is wordless


def test_a_wordless_end_is_classed_by_the_damage_that_was_found() -> None:
    """But not where the server had been ready: then the file was sound."""
    ending = Ending(1, START + END, "'/m/a.gguf': cannot read header: truncated")
    assert classify(ending) == (FailureClass.MODEL_CORRUPT, ending.damage)
    assert classify(ending, was_ready=True)[0] is FailureClass.CRASHED
    assert classify(Ending(1, START + END))[0] is FailureClass.CRASHED
