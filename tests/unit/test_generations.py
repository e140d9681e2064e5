"""What was applied is kept, and read back; what cannot be read costs only itself."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from supervisor_synapse import commit as commits
from supervisor_synapse.adapters import generations
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.adapters.generations import MOST_KEPT, Kept
from supervisor_synapse.core import trials
from supervisor_synapse.core.plan import Choice
from supervisor_synapse.core.trials import Generation, Good, Rejected, Standing
from tests.unit.applied import FAILURE, Applied, tiny

CHOICE = Choice(8100, 4096, "CPU", True, "basis")


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    found = Deployment(tmp_path)
    found.kept_blocks.mkdir(parents=True)
    return found


def block(text: str, name: str = "alpha") -> Kept:
    return Kept(name, text, True, tiny(name), CHOICE)


def generation(number: int, **changes: Any) -> Generation:
    values: dict[str, Any] = {
        "number": number, "at": 1.5, "surface": trials.DISCOVER, "why": "models came or went",
        "blocks": {"alpha": f"{number:064x}"}, "changed": ("alpha",),
        "failures": {"alpha": FAILURE}, "command": "e-1",
    }  # fmt: skip
    return Generation(**(values | changes))


def path_of(deployment: Deployment, digest: str) -> Path:
    return deployment.kept_blocks / f"{digest}.json"


STANDING = Standing(
    "a" * 64, 3, (Good("b" * 64, 1),), (Rejected("c" * 64, 2, FAILURE),), Rejected("d", 2, None)
)


def test_what_was_written_is_read_back(deployment: Deployment) -> None:
    one = block("[program:alpha]\r\ncommand=\u00fc \u2028 x\r\n\n")
    generations.keep(deployment, [one])
    assert generations.kept(deployment, one.digest) == one
    generations.record(deployment, generation(7))
    assert generations.load(deployment, 7) == generation(7)
    assert generations.every(deployment) == (generation(7),)
    generations.save_standings(deployment, {"alpha": STANDING})
    assert generations.standings(deployment) == {"alpha": STANDING}


def test_a_block_that_is_kept_is_not_written_again(deployment: Deployment) -> None:
    one = block("x")
    generations.keep(deployment, [one, one])
    before = path_of(deployment, one.digest).stat()
    generations.keep(deployment, [replace(one, is_ours=False)])
    after = path_of(deployment, one.digest).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_where_nothing_was_applied_there_is_nothing(tmp_path: Path) -> None:
    """Also no folder, as in a deployment of the first layout."""
    found = Deployment(tmp_path)
    assert generations.every(found) == ()
    assert generations.standings(found) == {}
    assert generations.load(found, 1) is None
    assert generations.kept(found, "a" * 64) is None
    assert generations.stamp(found) == (0, 0)
    generations.prune(found, {})


@pytest.mark.parametrize(
    "name", ["", "..", "../../etc/passwd", "a" * 63, "A" * 64, "a" * 64 + "\n", "/" * 64, "\0" * 64]
)
def test_only_a_digest_names_a_block(deployment: Deployment, name: str) -> None:
    (deployment.kept_blocks.parent / "x.json").write_text("{}")
    assert generations.kept(deployment, name) is None


# --- torn, foreign and hostile files --------------------------------------------------------------

TORN = {
    "empty": b"", "torn": b'{"name":"alpha","te', "noise": bytes(range(256)), "a list": b"[]",
    "null": b"null", "a number": b"17", "deep": b"[" * 100_000, "no UTF-8": b'"\xff\xfe"',
    "another shape": b'{"number":"x"}',
}  # fmt: skip


@pytest.mark.parametrize("content", TORN.values(), ids=TORN)
def test_a_torn_file_is_set_aside_and_costs_only_itself(
    deployment: Deployment, content: bytes
) -> None:
    good = block("good")
    generations.keep(deployment, [good])
    generations.record(deployment, generation(2))
    broken = "e" * 64
    (deployment.generations / "000001.json").write_bytes(content)
    path_of(deployment, broken).write_bytes(content)
    deployment.trials.write_bytes(content)
    assert generations.every(deployment) == (generation(2),)
    assert generations.kept(deployment, broken) is None
    assert generations.kept(deployment, good.digest) == good
    assert generations.standings(deployment) == {}
    generations.prune(deployment, {"alpha": Standing(good.digest, 2)})
    assert generations.kept(deployment, good.digest) == good


def test_a_kept_block_of_another_content_is_none(deployment: Deployment) -> None:
    """Somebody wrote into it: it is not what was applied."""
    one = block("good")
    generations.keep(deployment, [one])
    path = path_of(deployment, one.digest)
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"text": "[program:evil]\ncommand=/bin/evil\n"}))
    assert generations.kept(deployment, one.digest) is None
    assert not path.exists()
    generations.keep(deployment, [one])
    assert generations.kept(deployment, one.digest) == one


def test_a_kept_block_that_is_no_text_is_none(deployment: Deployment) -> None:
    """JSON can hold what UTF-8 cannot."""
    one = block("good")
    generations.keep(deployment, [one])
    path = path_of(deployment, one.digest)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"text": "\ud800"}))
    assert generations.kept(deployment, one.digest) is None


def test_what_is_no_file_is_not_waited_for(deployment: Deployment) -> None:
    os.mkfifo(deployment.generations / "000001.json")
    (deployment.generations / "000002.json").mkdir()
    os.mkfifo(path_of(deployment, "e" * 64))
    os.mkfifo(deployment.trials)
    assert generations.every(deployment) == ()
    assert generations.load(deployment, 1) is None
    assert generations.kept(deployment, "e" * 64) is None
    assert generations.standings(deployment) == {}


@pytest.mark.parametrize("number", [-1, 0, 10**30, 10**300])
def test_a_number_that_nobody_gave_is_no_generation(deployment: Deployment, number: int) -> None:
    assert generations.load(deployment, number) is None


def test_a_file_of_another_number_is_no_generation(deployment: Deployment) -> None:
    """As a copy is, which somebody made."""
    generations.record(deployment, generation(2))
    text = (deployment.generations / "000002.json").read_text()
    (deployment.generations / "000001.json").write_text(text)
    (deployment.generations / "000002 (copy).json").write_text(text)
    (deployment.generations / "2.json").write_text(text)
    assert generations.every(deployment) == (generation(2),)
    assert generations.load(deployment, 1) is None


# --- pruning -------------------------------------------------------------------------------------


def test_the_newest_twenty_generations_are_kept(deployment: Deployment) -> None:
    for number in range(1, 50):
        generations.record(deployment, generation(number))
        generations.prune(deployment, {})
    found = [one.number for one in generations.every(deployment)]
    assert found == list(range(50 - MOST_KEPT, 50))
    assert MOST_KEPT == 20


def test_the_newest_are_the_newest_by_number(deployment: Deployment) -> None:
    for number in (999_990, 1_000_005):
        for one in range(number, number + 10):
            generations.record(deployment, generation(one))
    generations.record(deployment, generation(1_000_015))
    generations.prune(deployment, {})
    assert [one.number for one in generations.every(deployment)] == [
        *range(999_991, 1_000_000), *range(1_000_005, 1_000_016),
    ]  # fmt: skip


def test_blocks_that_somebody_can_go_back_to_are_kept(deployment: Deployment) -> None:
    """Those of generations, the applied ones and the good ones, however old; no others."""
    named = {name: block(name) for name in ("listed", "applied", "good", "rejected", "nobody's")}
    generations.keep(deployment, named.values())
    digests = {name: one.digest for name, one in named.items()}
    generations.record(deployment, generation(1, blocks={"alpha": digests["listed"]}))
    standing = Standing(
        digests["applied"], 1, (Good(digests["good"], 1),),
        (Rejected(digests["rejected"], 1, FAILURE),),
    )  # fmt: skip
    generations.prune(deployment, {"alpha": standing})
    left = {name for name, one in digests.items() if generations.kept(deployment, one)}
    assert left == {"listed", "applied", "good"}


def test_a_stranger_in_the_folder_keeps_no_change_from_being_made(tmp_path: Path) -> None:
    """Forgetting is housekeeping: where it fails, what was changed stays changed."""
    at = Applied.at(tmp_path / "at")
    (at.deployment.generations / "000000.json").mkdir()
    (at.deployment.kept_blocks / "mine.json").mkdir()
    for number in range(MOST_KEPT + 2):
        at.discover(tiny("alpha", "--threads", str(number + 1)))
    assert at.registry().generation == MOST_KEPT + 2
    assert at.standings()["alpha"].digest == at.on_disk()["alpha"]


def test_twenty_changes_and_more_leave_no_more_than_is_of_use(tmp_path: Path) -> None:
    at = Applied.at(tmp_path / "at")
    for number in range(30):
        at.discover(tiny("alpha", "--threads", str(number + 1)), tiny("beta", port=8101))
        if number == 3:
            at.prove("alpha", "beta")
    assert len(generations.every(at.deployment)) == MOST_KEPT
    kept = {path.stem for path in at.deployment.kept_blocks.iterdir()}
    assert kept == trials.in_use(generations.every(at.deployment), at.standings())
    assert len(kept) == MOST_KEPT + 2  # the good one of alpha, and that of beta


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["registry.json", "registry.json and trials.json"])
def test_a_generation_has_a_number_that_none_before_had(tmp_path: Path, lost: str) -> None:
    """Also after the registry was lost; else what it brings would be taken for known and good."""
    at = Applied.at(tmp_path / "at")
    for number in range(25):
        at.discover(tiny("alpha", "--threads", str(number + 1)))
    at.prove("alpha")
    for name in lost.split(" and "):
        (at.deployment.lib / name).write_text("{")
    at.discover(tiny("alpha", "--threads", "25"), tiny("beta", port=8101))
    at.discover(tiny("alpha", "--mlock"), tiny("beta", port=8101))
    standing = at.standings()["alpha"]
    assert standing.digest == at.on_disk()["alpha"]
    assert standing.on_trial
    assert at.registry().generation == standing.generation == 27
    assert [one.number for one in generations.every(at.deployment)] == list(range(8, 28))


def test_a_generation_that_was_never_applied_gives_its_number_to_the_next(tmp_path: Path) -> None:
    at = Applied.at(tmp_path / "at")
    at.discover(tiny("alpha"))
    generations.record(at.deployment, generation(2))  # killed before the registry was written
    at.discover(tiny("alpha", "--mlock"))
    assert at.registry().generation == 2
    found = generations.load(at.deployment, 2)
    assert found is not None
    assert found.blocks == at.on_disk()


def test_a_generation_that_names_no_block_is_carried_on_without(tmp_path: Path) -> None:
    """Only by another hand than ours; it costs one model its trial, and the listener nothing."""
    at = Applied.at(tmp_path / "at")
    at.discover(tiny("alpha"))
    generations.record(at.deployment, generation(1, changed=("alpha", "x"), blocks={}))
    with commits.locked(at.deployment):
        commits.complete(at.deployment)
    assert at.standings()["alpha"].digest == at.on_disk()["alpha"]
