"""What loads took: the largest of the last few, by all that memory depends on, whole on disk."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from supervisor_synapse.adapters import footprints, store
from supervisor_synapse.adapters.footprints import Footprints
from supervisor_synapse.core.load_log import Loaded
from supervisor_synapse.core.model import Device, Estimate, FileIdentity, Part, Source
from supervisor_synapse.errors import TransientError
from tests.unit.builders import GIB, MIB

FILE = FileIdentity(1, 2, 3 * GIB, 4)
SHARD = FileIdentity(1, 3, 2 * GIB, 4)
GPU = Device("CUDA0", 24 * GIB, 20 * GIB, "NVIDIA GeForce RTX 3090")
OTHER_GPU = Device("CUDA1", 12 * GIB, 12 * GIB, "NVIDIA GeForce RTX 3060")
HOST = Device("CPU", 64 * GIB, 40 * GIB, "AMD EPYC")
ARGUMENTS = ("--alias", "m", "--port", "8100", "--ctx-size", "4096", "--gpu-layers", "99")
ON_GPU = Loaded(
    (
        Part("CUDA0", weights_bytes=900 * MIB, kv_bytes=64 * MIB, compute_bytes=36 * MIB),
        Part("CPU", weights_bytes=100 * MIB),
    ),
    17,
    17,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "memory.json"


def key(**changes: Any) -> str:
    values = {"files": [FILE], "arguments": ARGUMENTS, "engine_version": "1", "devices": [GPU]}
    return footprints.footprint_key(**(values | changes))


def learned(*loads: Loaded, **driver_bytes: int) -> Footprints:
    """Under "k", one after the other."""
    found = Footprints()
    for number, loaded in enumerate(loads):
        found = footprints.learn(found, "k", loaded, driver_bytes, at=float(number))
    return found


def taking(weights: int, kv: int = 0, offloaded: int | None = 17) -> Loaded:
    """A load on CUDA0, in MiB."""
    return Loaded((Part("CUDA0", weights * MIB, kv * MIB),), offloaded, 17)


# --- what is known --------------------------------------------------------------------------------


def test_what_was_never_loaded_is_not_known() -> None:
    assert footprints.known(learned(ON_GPU), "another") is None
    assert footprints.known(Footprints(), "k") is None


def test_a_load_is_known_as_it_was() -> None:
    assert footprints.known(learned(ON_GPU), "k") == Estimate(ON_GPU.parts, Source.LEARNED)


def test_the_largest_of_several_loads_is_known_part_by_part() -> None:
    found = footprints.known(learned(taking(10, 5), taking(12, 4), taking(11, 1)), "k")
    assert found == Estimate((Part("CUDA0", 12 * MIB, 5 * MIB),), Source.LEARNED)


def test_a_load_out_of_all_reason_is_forgotten_after_five_others() -> None:
    loads = [taking(100_000), *[taking(10)] * 4]
    estimate = footprints.known(learned(*loads), "k")
    assert estimate is not None
    assert estimate.on("CUDA0") == 100_000 * MIB
    estimate = footprints.known(learned(*loads, taking(10)), "k")
    assert estimate is not None
    assert estimate.on("CUDA0") == 10 * MIB


def test_a_load_that_placed_other_layers_replaces_those_before() -> None:
    """Their largest parts together would be more than any load takes."""
    host = Loaded((Part("CUDA0", 5 * MIB), Part("CPU", 15 * MIB)), 8, 17)
    found = footprints.known(learned(taking(20), host), "k")
    assert found == Estimate(host.parts, Source.LEARNED)


def test_what_the_driver_tells_beyond_the_buffers_is_overhead() -> None:
    estimate = footprints.known(learned(ON_GPU, CUDA0=1300 * MIB, CUDA1=91 * MIB), "k")
    assert estimate is not None
    by_device = {part.device: part.overhead_bytes for part in estimate.parts}
    assert by_device == {"CUDA0": 300 * MIB, "CUDA1": 91 * MIB, "CPU": 0}
    assert estimate.on("CUDA0") == 1300 * MIB


def test_a_driver_that_tells_less_than_the_buffers_is_not_believed() -> None:
    """Some make memory only when it is touched."""
    estimate = footprints.known(learned(ON_GPU, CUDA0=10 * MIB), "k")
    assert estimate is not None
    assert estimate.on("CUDA0") == 1000 * MIB


def test_what_drivers_leave_out_is_never_more_than_the_formula_has_for_all() -> None:
    otherwise = Estimate((Part("Vulkan0", 1, overhead_bytes=64 * MIB),))
    loaded = Loaded((Part("Vulkan0", weights_bytes=600 * MIB),), 3, 3)
    for held, known in ((610, 642), (650, 664), (700, 700)):
        told = footprints.known(learned(loaded, Vulkan0=held * MIB), "k", otherwise)
        assert told is not None
        assert told.on("Vulkan0") == known * MIB


def test_overheads_that_no_driver_told_are_those_of_another_estimate() -> None:
    """On the host the larger one: its prompt cache fills only later. Drivers leave out a little."""
    otherwise = Estimate(
        (Part("CUDA0", 1, overhead_bytes=550 * MIB), Part("CPU", 1, overhead_bytes=800 * MIB))
    )
    told = footprints.known(learned(ON_GPU, CUDA0=1100 * MIB, CPU=130 * MIB), "k", otherwise)
    untold = footprints.known(learned(ON_GPU), "k", otherwise)
    assert told is not None
    assert untold is not None
    assert (told.on("CUDA0"), told.on("CPU")) == (1132 * MIB, 900 * MIB)
    assert (untold.on("CUDA0"), untold.on("CPU")) == (1550 * MIB, 900 * MIB)


def test_the_engines_word_stands_until_a_load_is_learned() -> None:
    told = footprints.learn_dry_run(Footprints(), "k", taking(11), at=1.0)
    told = footprints.learn_dry_run(told, "k", taking(10), at=2.0)
    assert footprints.known(told, "k") == Estimate(taking(10).parts, Source.DRY_RUN)
    both = footprints.learn(told, "k", taking(9), {}, at=3.0)
    assert footprints.known(both, "k") == Estimate(taking(9).parts, Source.LEARNED)
    assert footprints.learn_dry_run(both, "k", taking(12), at=4.0) == both


def test_what_was_learned_for_longest_is_forgotten_when_there_is_no_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By order: the clock goes back here all the time."""
    monkeypatch.setattr(footprints, "_MOST_ENTRIES", 3)
    found = Footprints()
    for number, name in enumerate(["a", "b", "c", "a", "d", "e"]):
        found = footprints.learn(found, name, taking(1), {}, at=-float(number))
        found = footprints.learn_scratch(found, name, number, at=-float(number))
    assert list(found.by_key) == ["a", "d", "e"]
    assert list(found.scratches) == ["a", "d", "e"]


def test_a_scratch_is_the_latest() -> None:
    found = footprints.learn_scratch(Footprints(), "m", 700, at=1.0)
    found = footprints.learn_scratch(found, "m", 600, at=2.0)
    assert footprints.scratch_elements(found, "m") == 600
    assert footprints.scratch_elements(found, "n") is None


@pytest.mark.parametrize(
    "loaded",
    [
        taking(-1), taking(1 << 40), Loaded(tuple(Part(f"D{n}") for n in range(65)), 1, 1),
    ],
)  # fmt: skip
def test_a_load_that_cannot_be_true_is_not_learned(path: Path, loaded: Loaded) -> None:
    """A forged log costs its model, not what is known of the others."""
    before = learned(ON_GPU)
    after = footprints.learn(before, "forged", loaded, {}, at=9.0)
    after = footprints.learn_dry_run(after, "forged", loaded, at=9.0)
    after = footprints.learn_scratch(after, "forged", -1, at=9.0)
    assert after == before
    after = footprints.learn(before, "forged", ON_GPU, {"CUDA0": 1 << 60}, at=9.0)
    footprints.update(path, lambda _: after)
    assert footprints.load(path) == before


# --- keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("--ctx-size", "4096", "--gpu-layers", "99"),
        ("--gpu-layers", "99", "--ctx-size", "4096"),
        ("-c", "4096", "-ngl", "99"),
        ("--ctx-size=4096", "--n-gpu-layers=99"),
        (*ARGUMENTS, "--host", "0.0.0.0", "--api-key-file", "/etc/keys"),  # noqa: S104
        (*ARGUMENTS, "--cache-ram", "512", "--metrics", "--slots", "--sleep-idle-seconds", "60"),
        (*ARGUMENTS, "--port=8101", "-a", "other", "-v", "-lv", "4", "--log-file", "/x"),
        (*ARGUMENTS, "--jinja", "--temp", "-1", "--top-k", "40", "-s", "-1"),
        (*ARGUMENTS, "--model", "/elsewhere.gguf"),
    ],
)
def test_where_and_how_it_is_served_does_not_matter(arguments: tuple[str, ...]) -> None:
    assert key(arguments=arguments) == key()


@pytest.mark.parametrize(
    "changes",
    [
        {"arguments": ("--ctx-size", "8192", "--gpu-layers", "99")},
        {"arguments": ("--ctx-size", "4096")},
        {"arguments": (*ARGUMENTS, "--flash-attn", "off")},
        {"arguments": (*ARGUMENTS, "--cache-type-k", "q8_0")},
        {"arguments": (*ARGUMENTS, "--mmproj", "/p.gguf")},
        {"arguments": (*ARGUMENTS, "--not-known-yet")},
        {"arguments": (*ARGUMENTS, "--gpu-layers", "98")},
        {"files": [FILE, SHARD]},
        {"files": [FileIdentity(1, 2, 3 * GIB, 5)]},
        {"files": []},
        {"engine_version": "2"},
        {"devices": [GPU, OTHER_GPU]},
        {"devices": [Device("CUDA0", 24 * GIB, 20 * GIB, "NVIDIA GeForce RTX 4090")]},
        {"devices": [Device("CUDA0", 16 * GIB, 16 * GIB, GPU.description)]},
        {"devices": []},
    ],
)
def test_whatever_memory_depends_on_is_another_key(changes: dict[str, Any]) -> None:
    assert key(**changes) != key()


def test_what_is_free_and_the_host_do_not_matter() -> None:
    used = Device(GPU.name, GPU.total_bytes, 1, GPU.description)
    assert key(devices=[used, HOST]) == key()
    assert key(devices=[OTHER_GPU, GPU]) == key(devices=[GPU, OTHER_GPU])


def test_files_count_by_what_they_are_in_any_order() -> None:
    assert key(files=[FILE, SHARD]) == key(files=[SHARD, FILE])
    assert key(arguments=("--mmproj", "/a")) == key(arguments=("-mm", "/b/a"))
    assert key(arguments=("-md", "/a")) == key(arguments=("--spec-draft-model", "/b/a"))


def test_the_order_of_one_flag_counts_for_the_last_one_wins() -> None:
    assert key(arguments=("-c", "1", "-c", "2")) != key(arguments=("-c", "2", "-c", "1"))


def test_words_that_belong_to_no_flag_are_not_lost() -> None:
    assert key(arguments=("stray",)) != key(arguments=())
    assert key(arguments=("--metrics", "stray")) != key(arguments=("--metrics",))
    assert key(arguments=("--port", "1", "stray")) != key(arguments=("--port", "1"))


def test_a_scratch_holds_for_one_model_one_engine_and_one_kind_of_configuration() -> None:
    keys = {
        footprints.scratch_key(files, version, *traits)
        for files in ([FILE], [SHARD], [FILE, SHARD])
        for version in ("1", "2")
        for traits in ((), ("fa",), ("f16",), ("fa", "f16"))
    }
    assert len(keys) == 24


@given(st.lists(st.text(max_size=20), max_size=8))
def test_any_arguments_have_a_key_that_stays(arguments: list[str]) -> None:
    assert key(arguments=arguments) == key(arguments=list(arguments))
    assert footprints.normalised(arguments) == footprints.normalised([*arguments, "--metrics"])


# --- the file -------------------------------------------------------------------------------------

_SIZES = st.integers(0, 2**50)
_PARTS = st.builds(Part, st.text(max_size=8), _SIZES, _SIZES, _SIZES, _SIZES)
_LOADED = st.builds(
    Loaded, st.lists(_PARTS, max_size=3, unique_by=lambda part: part.device).map(tuple),
    st.none() | st.integers(0, 99), st.just(99),
)  # fmt: skip


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(max_size=5), _LOADED, max_size=4), st.floats(0, 1e10))
def test_whatever_was_learned_comes_back(path: Path, loads: dict[str, Loaded], at: float) -> None:
    def all_of_them(found: Footprints) -> Footprints:
        for name, loaded in loads.items():
            found = footprints.learn(found, name, loaded, {"CUDA0": 5}, at=at)
            found = footprints.learn_dry_run(found, name + " dry", loaded, at=at)
            found = footprints.learn_scratch(found, name, 7, at=at)
        return found

    path.unlink(missing_ok=True)
    assert footprints.update(path, all_of_them) == footprints.load(path)
    assert footprints.load(path) == all_of_them(Footprints())
    assert not path.with_name("memory.json.corrupt").exists()


def test_two_who_learn_lose_nothing(path: Path) -> None:
    """Each changes what is there when it writes."""
    for name in "abc":
        learn = functools.partial(footprints.learn, key=name, loaded=ON_GPU, driver_bytes={}, at=1)
        footprints.update(path, learn)
    assert list(footprints.load(path).by_key) == ["a", "b", "c"]


def test_who_comes_while_another_writes_changes_nothing(path: Path) -> None:
    def meanwhile(found: Footprints) -> Footprints:
        with pytest.raises(TransientError, match="another process is writing"):
            footprints.update(path, lambda _: Footprints())
        return footprints.learn(found, "k", ON_GPU, {}, at=1.0)

    footprints.update(path, meanwhile)
    assert list(footprints.load(path).by_key) == ["k"]


def test_where_nothing_changes_nothing_is_written(path: Path) -> None:
    footprints.update(path, lambda found: found)
    assert not path.exists()
    footprints.update(path, lambda _: learned(ON_GPU))
    before = path.stat()
    footprints.update(path, lambda _: learned(ON_GPU))
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_only_its_owner_can_read_it(path: Path) -> None:
    footprints.update(path, lambda _: learned(ON_GPU))
    assert path.stat().st_mode & 0o077 == 0


def test_a_disk_that_does_not_take_it_leaves_what_was(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        footprints.update(tmp_path / "gone" / "memory.json", lambda _: learned(ON_GPU))
    assert list(tmp_path.iterdir()) == []


def test_a_file_torn_at_any_place_is_set_aside(path: Path) -> None:
    footprints.update(path, lambda _: learned(ON_GPU))
    whole = path.read_bytes()
    for length in range(0, len(whole) - 2, 7):
        path.write_bytes(whole[:length])
        assert footprints.load(path) == Footprints()
        assert not path.exists()
        assert path.with_name("memory.json.corrupt").read_bytes() == whole[:length]


def test_nothing_remembered_is_no_problem(path: Path) -> None:
    assert footprints.load(path) == Footprints()
    path.mkdir()
    assert footprints.load(path) == Footprints()


def _stored(**changes: Any) -> dict[str, Any]:
    part = {"device": "CUDA0", "weights_bytes": 1}
    load = {"parts": [part], "offloaded": 1, "measured": []}
    footprint = {"loads": [load], "source": "learned", "at": 1.0}
    part |= changes.pop("part", {})
    load |= changes.pop("load", {})
    footprint |= changes.pop("footprint", {})
    return {"by_key": {"k": footprint}, "scratches": {}} | changes


def test_a_file_that_says_less_than_we_write_is_read(path: Path) -> None:
    path.write_text(json.dumps(_stored()))
    assert footprints.known(footprints.load(path), "k") == Estimate(
        (Part("CUDA0", 1),), Source.LEARNED
    )
    assert store.read_json(path) is not None


@pytest.mark.parametrize(
    "value",
    [
        [], 7, "x", {"by_key": []}, {"by_key": {"k": 1}}, _stored(part={"weights_bytes": -1}),
        _stored(part={"weights_bytes": 2**51}), _stored(part={"kv_bytes": 1.5}),
        _stored(part={"device": 3}), _stored(load={"parts": [{"device": "x"}] * 65}),
        _stored(load={"parts": 7}), _stored(footprint={"loads": []}),
        _stored(footprint={"source": "guessed"}), _stored(footprint={"at": "yesterday"}),
        _stored(scratches={"m": {"elements": -1, "at": 1.0}}), _stored(scratches={"m": 7}),
    ],
    ids=range(16),
)  # fmt: skip
def test_a_file_of_another_shape_is_set_aside(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
    assert footprints.load(path) == Footprints()
    assert path.with_name("memory.json.corrupt").exists()
