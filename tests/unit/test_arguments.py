"""What llama-server is told, and what a running one was told."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor_synapse.core.arguments import (
    Extent,
    Served,
    Serving,
    embedding_batch,
    load_of,
    naming_words,
    parse_served,
    placing_words,
    prompt_cache_words,
    standing_words,
)
from supervisor_synapse.core.estimate import Load
from supervisor_synapse.core.model import Engine as CoreEngine
from supervisor_synapse.core.model import Role
from tests.conftest import Engine
from tests.ports import free_port
from tests.unit.builders import FLAGS as PLAIN_FLAGS
from tests.unit.builders import GIB, MIB
from tests.unit.builders import engine as plain_engine

OPTIONAL = (
    "--kv-unified", "--cache-ram", "--metrics", "--slots", "--device", "--gpu-layers",
    "--sleep-idle-seconds", "--fit", "--log-verbosity", "--tensor-split", "--rpc",
)  # fmt: skip
FLAGS = PLAIN_FLAGS | {*OPTIONAL}
PLANNED = Served("127.0.0.1", 8100, "tiny", 4096, 4, api_key_file=None, sleep_seconds=0)
LAUNCHER = ("/bin/synapse-run", "--drain", "30", "--term", "2", "--", "/opt/llama-server")


@dataclass(frozen=True)
class Meant:
    """How one model shall be served, and how much of it lies where."""

    serving: Serving
    extent: Extent
    kv_bytes: int = 100 * MIB


def serving(**changes: Any) -> Meant:
    """A text model, where the engine chooses the device."""
    values: dict[str, Any] = {
        "host": "127.0.0.1", "port": 8100, "alias": "tiny", "role": Role.TEXT, "parallel": 4,
        "sleep_idle_seconds": 0, "extra": (), "context": 4096, "device": None, "gpu_layers": None,
    }  # fmt: skip
    values |= changes
    extents = {key: values.pop(key) for key in Extent._fields if key in values}
    kv_bytes = values.pop("kv_bytes", 100 * MIB)
    return Meant(Serving(**values), Extent(**extents), kv_bytes)


FULL = {
    "device": "CUDA0,RPC0", "gpu_layers": 99, "split": (12, 21), "rpc": ("127.0.0.1:50052",),
    "sleep_idle_seconds": 60,
}  # fmt: skip


def engine(flags: frozenset[str] = FLAGS) -> CoreEngine:
    """One that knows all that we tell it, unless a test says otherwise."""
    return plain_engine(flags=flags)


def groups(meant: Meant, one: CoreEngine) -> tuple[tuple[str, ...], ...]:
    return (
        naming_words(meant.serving),
        standing_words(meant.serving, one),
        placing_words(meant.extent, meant.serving, one),
        prompt_cache_words(meant.kv_bytes, meant.serving, one),
        meant.serving.extra,
    )


def server_arguments(meant: Meant, one: CoreEngine) -> tuple[str, ...]:
    """All that a server is told."""
    return tuple(word for group in groups(meant, one) for word in group)


def told(tokens: Sequence[str]) -> dict[str, str]:
    """Flag → the value that follows it, empty where the next word is a flag; the last one wins."""
    pairs = zip(tokens, [*tokens[1:], "--"], strict=True)
    return {
        word: "" if following.startswith("--") else following
        for word, following in pairs
        if word.startswith("--")
    }


# --- what it is told -----------------------------------------------------------------------------


def test_a_server_is_told_where_it_answers_and_for_how_much_at_once() -> None:
    found = told(server_arguments(serving(), engine()))
    expected = {
        "--alias": "tiny", "--host": "127.0.0.1", "--port": "8100", "--ctx-size": "4096",
        "--parallel": "4",
    }  # fmt: skip
    assert expected.items() <= found.items()
    assert found.keys() >= {"--metrics", "--slots", "--kv-unified", "--cache-ram"}
    assert found["--log-verbosity"] == "4"


def test_what_is_left_to_the_engine_is_not_told() -> None:
    found = told(server_arguments(serving(), engine()))
    assert found.keys().isdisjoint(
        {"--device", "--gpu-layers", "--fit", "--tensor-split", "--rpc", "--sleep-idle-seconds"}
    )


@pytest.mark.parametrize(
    ("changes", "flag", "value"),
    [
        ({"device": "CUDA0,CUDA1"}, "--device", "CUDA0,CUDA1"),
        ({"device": "none"}, "--device", "none"),
        ({"device": "CUDA0"}, "--fit", "off"),
        ({"split": (20, 13)}, "--tensor-split", "20,13"),
        ({"rpc": ("127.0.0.1:1", "[::1]:2")}, "--rpc", "127.0.0.1:1,[::1]:2"),
        ({"gpu_layers": 12}, "--gpu-layers", "12"),
        ({"gpu_layers": 0}, "--gpu-layers", "0"),
        ({"sleep_idle_seconds": 60}, "--sleep-idle-seconds", "60"),
    ],
)
def test_what_was_chosen_is_told(changes: dict[str, Any], flag: str, value: str) -> None:
    assert told(server_arguments(serving(**changes), engine()))[flag] == value


@pytest.mark.parametrize("kv_bytes", [0, 100 * MIB, 100 * GIB])
def test_prompts_kept_on_the_host_are_always_bounded(kv_bytes: int) -> None:
    """llama-server's own default is 8 GiB for each server."""
    mib = int(told(server_arguments(serving(kv_bytes=kv_bytes), engine()))["--cache-ram"])
    assert 0 < mib <= 1024


@pytest.mark.parametrize(
    ("role", "flag"), [(Role.EMBEDDING, "--embeddings"), (Role.RERANKER, "--reranking")]
)
def test_a_model_that_cannot_split_an_input_takes_it_in_one_batch(role: Role, flag: str) -> None:
    found = told(server_arguments(serving(role=role, context=1000), engine()))
    assert flag in found
    assert (found["--batch-size"], found["--ubatch-size"]) == ("1000", "1000")
    assert int(told(server_arguments(serving(role=role, context=2**20), engine()))[
        "--ubatch-size"]) == embedding_batch(2**20) < 2**20  # fmt: skip


@pytest.mark.parametrize("role", [Role.TEXT, Role.VISION, Role.DRAFT])
def test_a_model_that_writes_is_told_nothing_of_a_role(role: Role) -> None:
    found = told(server_arguments(serving(role=role), engine()))
    assert found.keys().isdisjoint({"--embeddings", "--reranking", "--ubatch-size", "--batch-size"})


@pytest.mark.parametrize("missing", OPTIONAL)
def test_an_engine_is_told_only_what_it_knows(missing: str) -> None:
    tokens = server_arguments(serving(**FULL), engine(flags=FLAGS - {missing}))
    everything = server_arguments(serving(**FULL), engine())
    assert missing in everything
    assert missing not in tokens
    gone = [missing] if missing in ("--kv-unified", "--metrics", "--slots") else [
        missing, told(everything)[missing]]  # fmt: skip
    at = everything.index(missing)
    assert tokens == everything[:at] + everything[at + len(gone) :]


@pytest.mark.parametrize(
    "extra",
    [
        ("--cache-ram", "64"), ("--cache-ram=64",), ("--slots",),
        ("--metrics", "--flash-attn", "on"), ("--fit", "on"), ("--log-verbosity=1",),
        ("--tensor-split", "1,1"),
    ],
)  # fmt: skip
def test_what_the_user_gives_comes_last_and_is_not_said_twice(extra: tuple[str, ...]) -> None:
    tokens = server_arguments(serving(**FULL, extra=extra), engine())
    assert tokens[-len(extra) :] == extra
    flag = extra[0].split("=")[0]
    assert [word.split("=")[0] for word in tokens].count(flag) == 1


@pytest.mark.parametrize(
    ("extra", "ours"),
    [
        ("-cram", "--cache-ram"), ("-lv", "--log-verbosity"), ("--verbosity", "--log-verbosity"),
        ("-ts", "--tensor-split"), ("-fit", "--fit"), ("-no-kvu", "--kv-unified"),
        ("--no-kv-unified", "--kv-unified"), ("-kvu", "--kv-unified"),
    ],
)  # fmt: skip
def test_the_users_word_counts_under_each_name_of_an_option(extra: str, ours: str) -> None:
    assert ours in server_arguments(serving(**FULL), engine())
    assert ours not in server_arguments(serving(**FULL, extra=(extra, "1")), engine())


# --- the real engine -----------------------------------------------------------------------------


def run(server: Engine, *arguments: str) -> str:
    done = subprocess.run(
        [server.path, *arguments], env=server.environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=30, check=False,
    )  # fmt: skip
    return done.stdout.decode("utf-8", "replace")


@pytest.mark.parametrize("role", list(Role))
def test_the_real_engine_takes_every_argument_that_we_give(
    llama_server: Engine, tmp_path: Path, role: Role
) -> None:
    """With no model to load it gets as far as that: no argument was refused."""
    flags = frozenset(re.findall(r"(?<![\w-])--[a-z][a-z-]+", run(llama_server, "--help")))
    every = serving(
        role=role, device="none", gpu_layers=0, sleep_idle_seconds=60, alias="Qwen/Qwen2.5:7b",
        port=free_port(), split=(20, 13), rpc=("127.0.0.1:9",),
    )  # fmt: skip
    tokens = server_arguments(every, engine(flags=flags))
    assert set(OPTIONAL) <= set(tokens)
    said = run(llama_server, "--model", str(tmp_path / "none.gguf"), *tokens)
    assert "error: invalid argument" not in said
    assert "error while handling argument" not in said
    assert "failed to open GGUF file" in said, said


# --- what it was told ----------------------------------------------------------------------------


def parsed(*arguments: str, planned: Served = PLANNED) -> Served | None:
    return parse_served((*LAUNCHER, *arguments), planned)


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        ((), {}),
        (("--port", "9000"), {"port": 9000}),
        (("--port=9000",), {"port": 9000}),
        (("--host", "::1"), {"host": "::1"}),
        (("-a", "mine"), {"alias": "mine"}), (("--alias", "a=b"), {"alias": "a=b"}),
        (("-c", "1024"), {"context": 1024}), (("--ctx-size", "1024"), {"context": 1024}),
        (("-np", "9"), {"parallel": 9}), (("--parallel", "9"), {"parallel": 9}),
        (("--api-key-file", "/k"), {"api_key_file": "/k"}),
        (("--api-key-file=/k=1",), {"api_key_file": "/k=1"}),
        (("--sleep-idle-seconds", "60"), {"sleep_seconds": 60}),
        (("--sleep-idle-seconds", "0"), {"sleep_seconds": 0}),
        (("--sleep-idle-seconds", "-1"), {"sleep_seconds": -1}),
        (("--port", "1", "--port", "2"), {"port": 2}),
        (("-c", "1", "--ctx-size=2"), {"context": 2}),
        (("--portable", "1", "--my-port", "2"), {}),
        (("--port", "9000", "--flash-attn"), {"port": 9000}),
    ],
)  # fmt: skip
def test_a_command_line_says_what_was_told_and_the_plan_the_rest(
    arguments: tuple[str, ...], changes: dict[str, Any]
) -> None:
    assert parsed(*arguments) == replace(PLANNED, **changes)


def test_the_words_before_the_engine_are_the_launchers() -> None:
    words = ("/bin/synapse-run", "--port", "1", "--", "/opt/llama-server", "-c", "256")
    assert parse_served(words, PLANNED) == replace(PLANNED, context=256)


@pytest.mark.parametrize(
    "command", [(), ("supervisord",), ("/usr/bin/python3", "/bin/supervisord", "-c", "x")]
)
def test_a_process_that_has_not_become_a_launcher_says_nothing(command: tuple[str, ...]) -> None:
    """Between fork and exec it shows its parent's command line."""
    assert parse_served(command, PLANNED) is None


@pytest.mark.parametrize(
    "arguments",
    [
        ("--port", "x"), ("--port",), ("-c", "1.5"), ("-np", ""), ("--port=",), ("--port", "0"),
        ("--port", "-1"), ("--port=65536",), ("--port", "9" * 5000),
    ],
)  # fmt: skip
def test_a_line_that_makes_no_sense_leaves_the_plan_standing(arguments: tuple[str, ...]) -> None:
    assert parsed(*arguments) == PLANNED


_NAME = st.text("abcdefghijklmnopqrstuvwxyz0123456789._:/", min_size=1, max_size=30)
_SERVING = st.builds(
    serving, host=st.sampled_from(["127.0.0.1", "::1", "0.0.0.0"]), port=st.integers(1024, 65535),  # noqa: S104 - only text
    alias=_NAME, role=st.sampled_from(Role), context=st.integers(256, 2**24),
    parallel=st.integers(1, 256), device=st.sampled_from([None, "CUDA0", "none"]),
    gpu_layers=st.sampled_from([None, 0, 99]), sleep_idle_seconds=st.integers(0, 10**7),
    extra=st.sampled_from([(), ("--flash-attn", "on"), ("--api-key-file", "/k"), ("--slots",)]),
    split=st.sampled_from([(), (20, 13)]),
)  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(meant=_SERVING)
def test_what_was_told_is_read_back(meant: Meant) -> None:
    """Whatever was planned meanwhile."""
    other = Served("10.0.0.1", 1, "other", 1, 1, None, sleep_seconds=0)
    command = (*LAUNCHER, "--model", "/m.gguf", *server_arguments(meant, engine()))
    assert parse_served(command, other) == Served(
        meant.serving.host, meant.serving.port, meant.serving.alias, meant.extent.context,
        meant.serving.parallel, "/k" if "--api-key-file" in meant.serving.extra else None,
        meant.serving.sleep_idle_seconds,
    )  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(words=st.lists(st.text(max_size=12) | st.sampled_from(["--", "--port", "-c", "-np="])))
def test_no_command_line_whatever_breaks_the_reading(words: list[str]) -> None:
    found = parse_served(words, PLANNED)
    assert (found is None) is ("--" not in words)


# --- what memory depends on ----------------------------------------------------------------------

UNTOLD = Load(0, 4)  # what holds where nothing is said


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("", {}),
        ("-c 1024", {"context": 1024}), ("--ctx-size=1024", {"context": 1024}),
        ("-np 2", {"parallel": 2, "unified": False}),
        ("--parallel 2 -kvu", {"parallel": 2, "unified": True}),
        ("--parallel 2 --kv-unified --no-kv-unified", {"parallel": 2, "unified": False}),
        ("-np -1", {}), ("-no-kvu", {"unified": False}),
        ("-ub 64", {"ubatch": 64}), ("--ubatch-size 4096", {"ubatch": 2048}),
        ("--ubatch-size 4096 -b 4096", {"ubatch": 4096}), ("--batch-size 32", {"ubatch": 32}),
        ("-dev CUDA0", {"devices": ("CUDA0",)}), ("--device none", {"devices": ()}),
        ("--device CUDA0,RPC1", {"devices": ("CUDA0", "RPC1")}),
        ("-ts 3,1", {"split": (3.0, 1.0)}), ("--tensor-split=0.5/1.5", {"split": (0.5, 1.5)}),
        ("-ngl 7", {"gpu_layers": 7}), ("--n-gpu-layers 0", {"gpu_layers": 0}),
        ("--gpu-layers all", {}), ("--gpu-layers 3 -ngl auto", {"gpu_layers": None}),
        ("-ctk q8_0", {"cache_type_k": "q8_0"}), ("--cache-type-v=q4_0", {"cache_type_v": "q4_0"}),
        ("-fa off", {"flash_attention": False}), ("--flash-attn auto", {}), ("-fa", {}),
        ("--flash-attn off --flash-attn on", {}),
        ("--swa-full", {"swa_full": True}),
        ("--embeddings", {"embeddings": True}), ("--embedding", {"embeddings": True}),
        ("--reranking", {"embeddings": True}), ("--rerank", {"embeddings": True}),
        ("-ncmoe 3", {"expert_layers_on_host": 3}), ("--n-cpu-moe=0", {}),
        ("-cmoe", {"expert_layers_on_host": 9999}), ("--cpu-moe", {"expert_layers_on_host": 9999}),
        ("-cram 64", {"prompt_cache_bytes": 64 * MIB}),
        ("--cache-ram 0", {"prompt_cache_bytes": 0}),
        ("--cache-ram -1", {"prompt_cache_bytes": 8 * GIB}),
        ("--ctx-checkpoints 5 --n-cpu 3 -x=1", {}),
    ],
)  # fmt: skip
def test_arguments_say_what_memory_depends_on(words: str, changes: dict[str, Any]) -> None:
    assert load_of(words.split()) == replace(UNTOLD, **changes)


@pytest.mark.parametrize(
    "words",
    [
        "-c", "-c x", "-c 0", "-c -5", "-c 1.5", "-np zero", "-ub 0", "--device", "--device --fit",
        "-ts a,b", "-ts 1,-1", "-ts nan", "-ts inf,1", "-ts", "-ngl some", "-ctk q9", "--cache-ram",
        "--n-cpu-moe -1", "--cache-ram lots", "--kv-unified=1",
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_as_if_it_had_not_been_said(words: str) -> None:
    assert load_of(words.split()) == UNTOLD
    said = [
        "-c",
        "512",
        "-np",
        "3",
        "-kvu",
        "-ub",
        "64",
        "-dev",
        "A,B",
        "-ts",
        "2,1",
        "-ngl",
        "5",
        "-ctk",
        "q8_0",
        "-cram",
        "1",
        "-ncmoe",
        "2",
    ]
    assert load_of([*said, *words.split()]) == load_of(said)


def test_what_is_not_said_is_the_models_context_and_every_device() -> None:
    assert load_of((), trained_context=4096, devices=("A", "B")) == replace(
        UNTOLD, context=4096, devices=("A", "B")
    )
    said = load_of(("-c", "1", "-dev", "none"), trained_context=4096, devices=("A", "B"))
    assert (said.context, said.devices) == (1, ())


@settings(max_examples=120, deadline=None)
@given(meant=_SERVING)
def test_what_a_server_is_told_is_what_it_takes_memory_for(meant: Meant) -> None:
    """Word by word, or in its groups."""
    told, extent = meant.serving, meant.extent
    found = load_of(server_arguments(meant, engine()))
    assert found == load_of(*groups(meant, engine()))
    assert (found.context, found.parallel, found.unified) == (extent.context, told.parallel, True)
    devices = () if extent.device in (None, "none") else ("CUDA0",)
    assert (found.devices, found.gpu_layers, found.split) == (
        devices, extent.gpu_layers, extent.split,
    )  # fmt: skip
    batch = embedding_batch(extent.context)
    is_whole = told.role in (Role.EMBEDDING, Role.RERANKER)
    assert (found.ubatch, found.embeddings) == (batch if is_whole else 512, is_whole)
    assert found.prompt_cache_bytes == 200 * MIB


@settings(max_examples=120, deadline=None)
@given(words=st.lists(st.text(max_size=12) | st.sampled_from(["-c", "-ts", "-dev=", "-ngl", "9"])))
def test_no_words_whatever_break_the_reading(words: list[str]) -> None:
    assert load_of(words).parallel > 0
