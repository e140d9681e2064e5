"""What a repo's files offer, which is chosen, and what is said of disk and memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisor_synapse import pull
from supervisor_synapse.adapters import checksums, hub
from supervisor_synapse.adapters.hub import Listing
from supervisor_synapse.core.offers import (
    HubFile,
    Offer,
    asked_for,
    offers,
    preferred,
    projector_of,
)
from supervisor_synapse.core.settings import Settings
from supervisor_synapse.errors import ApplyError, ConfigError
from tests.unit.builders import GIB, MIB, gpu, host


def files(*names: str, size_bytes: int = MIB) -> list[HubFile]:
    return [HubFile(name, size_bytes) for name in names]


def labels(found: tuple[Offer, ...]) -> list[str]:
    return [offer.label for offer in found]


# --- what there is -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("qwen2.5-1.5b-instruct-q4_k_m.gguf", "Q4_K_M"),
        ("Llama-3.2-3B-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("gemma-IQ2_XXS.gguf", "IQ2_XXS"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("model-BF16.gguf", "BF16"),
        ("model.Q8_0.gguf", "Q8_0"),
        ("Q6_K/model-00001-of-00001.gguf", "Q6_K"),
        ("tiny-q2-Q5_K_S.gguf", "Q5_K_S"),
        ("model.gguf", "model"),
    ],
)
def test_a_quantization_is_what_the_name_says(name: str, label: str) -> None:
    """The folder where the name says none; the name itself where neither does."""
    assert labels(offers(files(name))) == [label]


def test_shards_are_one_offer_in_their_order() -> None:
    """Whatever order they are listed in; a split that lacks a part is none."""
    whole = ["a/m-Q8_0-00002-of-00002.gguf", "a/m-Q8_0-00001-of-00002.gguf"]
    (offer,) = offers(files(*whole, "m-Q4_0-00001-of-00003.gguf"))
    assert [file.path for file in offer.files] == sorted(whole)
    assert offer.size_bytes == 2 * MIB


def test_files_that_no_server_is_started_with_are_no_offer() -> None:
    found = offers(
        files(
            "mmproj-F16.gguf", "imatrix.gguf", "lora-adapter-F16.gguf", "README.md", "m.safetensors"
        )
    )
    assert found == ()


def test_the_projector_is_the_one_that_is_served_later() -> None:
    """F16 first, being what every backend computes in."""
    names = ("mmproj-model-F32.gguf", "mmproj-BF16.gguf", "mmproj-F16.gguf", "model-F16.gguf")
    chosen = projector_of(files(*names))
    assert chosen is not None
    assert chosen.path == "mmproj-F16.gguf"
    assert projector_of(files("model-F16.gguf")) is None


# --- which is chosen -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        (("m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-Q2_K.gguf"), ["Q4_K_M"]),
        (("m-Q8_0.gguf", "m-Q4_K_S.gguf"), ["Q4_K_S"]),
        (("m-Q8_0.gguf", "m-F16.gguf"), ["Q8_0"]),
        (("m-F16.gguf",), ["F16"]),
        (("m-draft-Q4_K_M.gguf", "m-Q8_0.gguf"), ["Q8_0"]),
        (("a-Q4_K_M.gguf", "b-Q4_K_M.gguf"), ["Q4_K_M", "Q4_K_M"]),
    ],
)
def test_without_a_word_the_usual_one_is_chosen(there: tuple[str, ...], chosen: list[str]) -> None:
    """Several where the names leave it open; drafts only where there is nothing else."""
    assert labels(preferred(offers(files(*there)))) == chosen


@pytest.mark.parametrize(
    ("word", "chosen"),
    [
        ("q4_k_m", ["m-Q4_K_M"]),
        ("Q8_0", ["m-Q8_0"]),
        ("m-q8_0", ["m-Q8_0"]),
        ("sub/m-Q8_0.gguf", ["m-Q8_0"]),
        ("Q4", []),
    ],
)
def test_a_word_names_a_quantization_or_a_file(word: str, chosen: list[str]) -> None:
    offered = offers(files("m-Q4_K_M.gguf", "sub/m-Q8_0.gguf", "m-mtp-Q4_K_M.gguf"))
    assert [offer.stem for offer in asked_for(offered, word)] == chosen


@pytest.mark.parametrize(
    ("what", "meant"),
    [("acme/tiny", ("acme/tiny", "")), ("acme/tiny:Q4_K_M", ("acme/tiny", "Q4_K_M"))],
)
def test_what_is_asked_for_is_a_repo_and_a_quantization(what: str, meant: tuple[str, str]) -> None:
    assert pull.parse(what) == meant


@pytest.mark.parametrize(
    "what", ["", "tiny", "../x", "acme/../x", "a/b/c", "a/b:", "a/b:$(x)", "a/b:\n", "-x/y", "a /b"]
)
def test_what_is_no_repo_is_refused(what: str) -> None:
    with pytest.raises(ConfigError):
        pull.parse(what)


# --- whether it fits -----------------------------------------------------------------------------


def choice(cache: Path, *there: HubFile) -> pull.Choice:
    offer = offers(there)[0]
    return pull.Choice(Listing("acme/m", "c" * 40, there), offer, None, (), cache)


def test_what_is_here_already_counts(tmp_path: Path) -> None:
    """Whole blobs, and what an interrupted download has left."""
    whole, part, none = (HubFile(f"{n}-Q8_0.gguf", 100, n * 64) for n in "abc")
    blobs = hub.folder_of(tmp_path, "acme/m") / "blobs"
    blobs.mkdir(parents=True)
    (blobs / ("a" * 64)).write_bytes(bytes(100))
    (blobs / ("b" * 64 + ".incomplete")).write_bytes(bytes(30))
    assert hub.missing_bytes(tmp_path, "acme/m", (whole, part, none)) == 170


def test_more_than_the_disk_holds_is_refused(tmp_path: Path) -> None:
    """By the file system of a cache that does not exist yet."""
    cache = tmp_path / "not" / "there"
    pull.require_room(choice(cache, HubFile("m-Q8_0.gguf", MIB)))
    with pytest.raises(ApplyError, match=r"the disk of .*/not/there has .* free; free some"):
        pull.require_room(choice(cache, HubFile("m-Q8_0.gguf", 2**60)))


@pytest.mark.parametrize(
    ("size_bytes", "says"),
    [
        (GIB, ""),
        (7 * GIB, "there is not so much free now"),
        (12 * GIB, "it fits on no single device"),
        (40 * GIB, "warning: more than all memory of this machine"),
    ],
)
def test_memory_is_told_and_never_refuses(size_bytes: int, says: str) -> None:
    devices = (gpu("CUDA0", 10 * GIB, 2 * GIB), host(12 * GIB, 3 * GIB))
    first, *rest = pull.memory_lines(size_bytes, devices, Settings())
    assert "CUDA0 has 2048 MiB free of 10.0 GiB" in first
    assert [line[: len(says)] for line in rest] == ([says] if says else [])


# --- hostile names, damaged content --------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["../x", "a/../b", "/etc/passwd", "a//b", "a\\b", "a\nb", ".hidden", "", "a/.", 7, None]
)
def test_a_name_that_could_lead_elsewhere_is_left_out(path: object) -> None:
    assert not hub.is_safe(path)


def test_content_is_compared_with_the_hash_that_names_it(tmp_path: Path) -> None:
    """sha256 for large files, git's own for small ones; each byte counts."""
    path = tmp_path / "blob"
    path.write_bytes(b"hello\n")
    sha256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
    git = "ce013625030ba8dba906f756967f9e9ca394464a"
    read: list[int] = []
    assert checksums.is_whole(path, sha256, read.append)
    assert checksums.is_whole(path, git)
    assert read == [6]
    path.write_bytes(b"hellp\n")
    assert not checksums.is_whole(path, sha256)
    assert not checksums.is_whole(path, git)
    assert not checksums.can_tell("W-etag")
