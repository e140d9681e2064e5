"""`synapse pull` against a hub on loopback: what comes, what is said before, what goes wrong."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.gguf_factory import write_split
from tests.integration.harness import (
    Deployment,
    chat,
    deployed,
    foreground,
    wait_until,
    write_working_projector,
)
from tests.integration.hub import Hub, serving

SPLIT = ("tiny-Q4_K_M-00001-of-00002.gguf", "tiny-Q4_K_M-00002-of-00002.gguf")
LARGE = b"GGUF" + bytes(range(256)) * 2**16  # 16 MiB that nobody serves
PIECE = 10 * 2**20  # huggingface_hub writes in pieces of this size
HELD = 11 * 2**20


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as served:
        yield served


@pytest.fixture(scope="module")
def shared() -> Iterator[Deployment]:
    """One for all tests that only download; each pulls a repo of its own."""
    with deployed() as deployment:
        yield deployment


@pytest.fixture
def deployment(shared: Deployment, hub: Hub) -> Deployment:
    shared.extra_environment = hub.environment()
    return shared


def blobs(deployment: Deployment, repo: str) -> list[str]:
    return sorted(path.name for path in (deployment.hub.repo(repo) / "blobs").iterdir())


def test_all_shards_and_the_projector_come_and_serve(hub: Hub) -> None:
    """Pulled, discovered and started; it answers, and sees."""
    with deployed() as deployment:
        deployment.extra_environment = hub.environment()
        shards = write_split(deployment.sources, "tiny-Q4_K_M", architecture="gemma3")
        projector = write_working_projector(deployment.sources / "p.gguf")
        files = {path.name: path.read_bytes() for path in shards}
        files |= {"mmproj-F16.gguf": projector.read_bytes(), "README.md": b"hello"}
        hub.add("acme/tiny", files | {"tiny-Q8_0.gguf": b"GGUF" * 1000})
        deployment.synapse("init")
        done = deployment.synapse("pull", "acme/tiny")
        assert "acme/tiny: Q4_K_M, 2 files and mmproj-F16.gguf" in done.err
        assert "also there: Q8_0" in done.err
        assert "synapse discover" in done.out
        snapshot = deployment.hub.repo("acme/tiny") / "snapshots" / hub.commit("acme/tiny")
        assert sorted(path.name for path in snapshot.iterdir()) == ["mmproj-F16.gguf", *SPLIT]
        found = deployment.discover()
        assert [model["name"] for model in found["models"]] == ["tiny-q4_k_m"]
        assert found["problems"] == []
        assert found["models"][0]["role"] == "vision"
        assert len(found["models"][0]["shards"]) == 2
        deployment.synapse("up", "--detach")
        assert chat(deployment.wait_ready()["tiny-q4_k_m"])


def test_what_was_interrupted_goes_on_where_it_stopped(deployment: Deployment, hub: Hub) -> None:
    """Ctrl-C is 130 and keeps what came; the hub is asked for the rest alone."""
    hub.add("acme/large", {"large-Q4_K_M.gguf": LARGE})
    hub.hold_after = HELD
    with foreground(deployment, "pull", "acme/large", terminal=False) as command:
        assert hub.held.wait(30)
        (part,) = (deployment.hub.repo("acme/large") / "blobs").iterdir()
        wait_until(lambda: part.stat().st_size >= PIECE, 30, "what came is written")
        command.press_ctrl_c()
        assert command.end() == 130
        assert "goes on where it stopped" in command.said
    hub.released.set()
    assert not (deployment.hub.repo("acme/large") / "refs").exists()
    hub.hold_after = None
    deployment.synapse("pull", "acme/large")
    assert hub.downloads("large-Q4_K_M.gguf") == [0, PIECE]
    (link,) = deployment.hub.root.glob("models--acme--large/snapshots/*/large-Q4_K_M.gguf")
    assert link.read_bytes() == LARGE


def test_a_connection_that_breaks_is_taken_up_again(deployment: Deployment, hub: Hub) -> None:
    hub.add("acme/cut", {"cut-Q4_K_M.gguf": LARGE})
    hub.cut_after = HELD
    deployment.synapse("pull", "acme/cut")
    assert hub.downloads("cut-Q4_K_M.gguf") == [0, PIECE]


def test_what_is_there_is_not_downloaded_again(deployment: Deployment, hub: Hub) -> None:
    hub.add("acme/twice", {"twice-Q4_K_M.gguf": LARGE[:5000]})
    deployment.synapse("pull", "acme/twice")
    again = deployment.synapse("pull", "acme/twice")
    assert "already" in again.err
    assert "\r" not in again.text
    assert hub.downloads("twice-Q4_K_M.gguf") == [0]


def test_content_that_is_not_what_was_promised_is_not_kept(
    deployment: Deployment, hub: Hub
) -> None:
    hub.add("acme/wrong", {"wrong-Q4_K_M.gguf": LARGE[:5000]})
    hub.corrupt = True
    done = deployment.synapse("pull", "acme/wrong", expect=1)
    assert "is not what the hub promised" in done.err
    assert blobs(deployment, "acme/wrong") == []


def test_a_new_revision_keeps_the_other_quantizations_in_sight(
    deployment: Deployment, hub: Hub
) -> None:
    """A file that did not change is linked anew, not downloaded."""
    hub.add("acme/both", {"both-Q4_K_M.gguf": LARGE[:5000]})
    deployment.synapse("pull", "acme/both")
    hub.add("acme/both", {"both-Q8_0.gguf": LARGE[:9000]})
    deployment.synapse("pull", "acme/both:q8_0")
    snapshot = deployment.hub.repo("acme/both") / "snapshots" / hub.commit("acme/both")
    names = sorted(path.name for path in snapshot.iterdir())
    assert names == ["both-Q4_K_M.gguf", "both-Q8_0.gguf"]
    assert hub.downloads("both-Q4_K_M.gguf") == [0]


def test_an_unknown_quantization_names_those_that_there_are(
    deployment: Deployment, hub: Hub
) -> None:
    hub.add("acme/some", {"some-Q4_0.gguf": b"x" * 2**20, "some-Q8_0.gguf": b"y" * 2**21})
    done = deployment.synapse("pull", "acme/some:Q6_K", expect=2)
    assert done.err == ("synapse: acme/some has no 'Q6_K'; it has: Q4_0 (1 MiB), Q8_0 (2 MiB)\n")


def test_what_the_disk_does_not_hold_is_refused(deployment: Deployment, hub: Hub) -> None:
    """And a warning that memory does not either; nothing is downloaded."""
    hub.add("acme/huge", {"huge-Q4_K_M.gguf": b"x"})
    hub.size_promised = 2**60
    done = deployment.synapse("pull", "acme/huge", expect=1)
    assert "cannot download 1073741824.0 GiB: the disk of " in done.err
    assert "warning: more than all memory of this machine" in done.err
    assert hub.downloads("huge-Q4_K_M.gguf") == []


@pytest.mark.parametrize(
    ("what", "status", "says"),
    [
        ("acme/nothing", 2, "has no repo acme/nothing"),
        ("acme/gated", 2, "acme/gated is gated: accept its terms"),
        ("acme/..", 2, "names no repo"),
        ("acme/plain", 2, "holds no GGUF model"),
    ],
)
def test_what_cannot_be_had_says_how_to_mend_it_in_one_line(
    what: str, status: int, says: str, deployment: Deployment, hub: Hub
) -> None:
    hub.add("acme/gated", {"gated-Q4_K_M.gguf": b"x" * 100})
    hub.add("acme/plain", {"model.safetensors": b"x"})
    hub.gated.add("acme/gated")
    done = deployment.synapse("pull", what, expect=status)
    lines = [line for line in done.err.splitlines() if line.startswith("synapse: ")]
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in done.err


_ON_A_SMALL_DISK = """
mkdir -p "$1" && mount -t tmpfs -o size=12m none "$1" || exit 99
shift
"$@"; echo "status $?"
mount -o remount,size=40m "$HF_HUB_CACHE"
"$@"; echo "status $?"
cat "$HF_HUB_CACHE"/models--acme--full/snapshots/*/full-Q4_K_M.gguf | cksum
"""


def test_a_disk_that_becomes_full_keeps_what_came(deployment: Deployment, hub: Hub) -> None:
    """A real one, filled by more than the hub had said; with room the same command goes on."""
    alone = ("unshare", "-rm", "/bin/sh", "-c")
    probe = [*alone, "mount -t tmpfs none /mnt"]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("no namespace in which to mount a small file system")
    hub.add("acme/full", {"full-Q4_K_M.gguf": LARGE})
    hub.size_promised = 100
    cache = str(deployment.root / "small")
    deployment.extra_environment |= {"HF_HUB_CACHE": cache}
    command = deployment.command("pull", "acme/full")
    done = deployment.run(*alone, _ON_A_SMALL_DISK, "sh", cache, *command)
    assert [line for line in done.out.splitlines() if "status" in line] == ["status 1", "status 0"]
    assert "the disk is full; what came so far is kept" in done.err
    first, second = hub.downloads("full-Q4_K_M.gguf")
    assert (first, second >= PIECE) == (0, True)
    assert str(len(LARGE)) in done.out.splitlines()[-1]


def test_a_hub_that_fails_is_named(deployment: Deployment, hub: Hub) -> None:
    hub.status = 503
    done = deployment.synapse("pull", "acme/any", expect=1)
    assert f"{hub.url} answers with status 503: try again later" in done.err


@pytest.mark.parametrize("garbage", [b"<html>log in first</html>", b"[]"])
def test_what_is_no_hub_is_named(garbage: bytes, deployment: Deployment, hub: Hub) -> None:
    hub.garbage = garbage
    done = deployment.synapse("pull", "acme/any", expect=1)
    assert done.err.startswith(f"synapse: cannot read what {hub.url} says")
    assert done.err.count("\n") == 1


def test_a_hub_that_is_not_there_is_named(shared: Deployment) -> None:
    with serving() as gone:
        shared.extra_environment = gone.environment()
    done = shared.synapse("pull", "acme/any", expect=1)
    assert done.err.startswith(f"synapse: cannot reach {gone.url}")
    assert done.err.count("\n") == 1


def test_offline_is_respected(deployment: Deployment, hub: Hub) -> None:
    deployment.extra_environment |= {"HF_HUB_OFFLINE": "1"}
    done = deployment.synapse("pull", "acme/any", expect=2)
    assert "HF_HUB_OFFLINE is set" in done.err
    assert hub.asked == []


def test_the_token_is_sent_and_never_shown(deployment: Deployment, hub: Hub) -> None:
    hub.add("acme/mine", {"mine-Q4_K_M.gguf": LARGE[:5000]})
    deployment.extra_environment |= {"HF_TOKEN": "hf_secretsecret"}
    done = deployment.synapse("pull", "acme/mine")
    assert {one.token for one in hub.asked} == {"Bearer hf_secretsecret"}
    assert "secret" not in done.text


def test_names_that_lead_out_of_the_cache_are_left_out(deployment: Deployment, hub: Hub) -> None:
    hub.add("acme/evil", {"../../evil-Q4_K_M.gguf": b"x", "good-Q8_0.gguf": LARGE[:5000]})
    done = deployment.synapse("pull", "acme/evil")
    assert "acme/evil: Q8_0" in done.err
    assert "evil-Q4" not in done.err


def test_a_terminal_sees_progress(deployment: Deployment, hub: Hub) -> None:
    """huggingface_hub's own bar, in ASCII."""
    hub.add("acme/bar", {"bar-Q8_0.gguf": LARGE[:9000]})
    with foreground(deployment, "pull", "acme/bar:q8_0", terminal=True) as command:
        assert command.end() == 0
        assert "100%|###" in command.said
        assert command.said.isascii()
