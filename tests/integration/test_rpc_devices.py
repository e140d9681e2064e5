"""Devices with set memory out of real rpc-servers: what the other tests of memory stand on."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from supervisor_synapse.adapters import engine as engines
from supervisor_synapse.adapters.gpu import cpu, drivers
from supervisor_synapse.core.failures import Ending, classify
from supervisor_synapse.core.model import Device, DeviceReading, FailureClass
from supervisor_synapse.errors import ConfigError
from tests import conftest, gguf_factory
from tests.integration import rpc_devices
from tests.integration.harness import wait_until
from tests.integration.rpc_devices import RpcDevice, rpc_device
from tests.ports import free_port

MIB = 1024 * 1024
_BUFFER = re.compile(r"RPC0\[\S+\] +(\w+) buffer size = +([\d.]+) MiB")
_ROUNDING_BYTES = 0.005 * MIB + 1  # of each figure in the log
_LONGEST_SECONDS = 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """0.11 MiB of weights on the device, 0.12 MiB of KV at 512 tokens, 1 MiB of scratch."""
    return gguf_factory.write_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture
def device() -> Iterator[RpcDevice]:
    with rpc_device(64 * MIB) as one:
        yield one


def on(*devices: RpcDevice, context: int = 512) -> tuple[str, ...]:
    """Arguments that put a whole model on devices, and let nothing be moved to the host."""
    names = ",".join(f"RPC{number}" for number in range(len(devices)))
    endpoints = ",".join(one.endpoint for one in devices)
    return ("--rpc", endpoints, "--device", names, "--gpu-layers", "99", "--fit", "off",
            "--ctx-size", str(context), "--log-verbosity", "4")  # fmt: skip


def listed(llama_server: conftest.Engine, *devices: RpcDevice) -> list[Device]:
    """What the engine itself says of them."""
    done = subprocess.run(
        [llama_server.path, "--rpc", ",".join(one.endpoint for one in devices), "--list-devices"],
        env=llama_server.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=_LONGEST_SECONDS, check=True,
    )  # fmt: skip
    return [one for one in engines.parse_devices(done.stdout) if one.name.startswith("RPC")]


def asked(*devices: RpcDevice) -> tuple[Device, ...]:
    """What our own question to the engine finds."""
    found = engines.devices(engines.find("auto"), [one.endpoint for one in devices])
    return tuple(one for one in found if one.name.startswith("RPC"))


def buffers(log: str) -> dict[str, int]:
    """Bytes of each buffer on RPC0, by kind, as the server's log tells them."""
    return {kind: round(float(size) * MIB) for kind, size in _BUFFER.findall(log)}


def end_of(llama_server: conftest.Engine, model: Path, *arguments: str) -> tuple[int, str]:
    """Exit status and log of a server that is expected to end by itself."""
    command = [llama_server.path, "--model", str(model), "--host", "127.0.0.1",
               "--port", str(free_port()), "--parallel", "1", *arguments]  # fmt: skip
    done = subprocess.run(
        command, env=llama_server.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", timeout=_LONGEST_SECONDS,
        check=False,
    )  # fmt: skip
    status = done.returncode
    return (128 - status if status < 0 else status), done.stdout


# --- told ----------------------------------------------------------------------------------------


def test_the_engine_lists_each_device_with_the_memory_that_was_set(
    llama_server: conftest.Engine,
) -> None:
    with rpc_device(64 * MIB) as first, rpc_device(3072 * MIB) as second:
        assert listed(llama_server, first, second) == [
            Device("RPC0", 64 * MIB, 64 * MIB, first.endpoint),
            Device("RPC1", 3072 * MIB, 3072 * MIB, second.endpoint),
        ]


def test_what_a_stranger_takes_is_not_free_until_it_gives_it_back(
    llama_server: conftest.Engine, device: RpcDevice
) -> None:
    device.take(60 * MIB)
    (seen,) = listed(llama_server, device)
    assert (seen.total_bytes, seen.free_bytes) == (64 * MIB, 4 * MIB)
    with pytest.raises(MemoryError):
        device.take(5 * MIB)
    device.give_back(50 * MIB)
    (seen,) = listed(llama_server, device)
    assert seen.free_bytes == 54 * MIB


def test_the_memory_of_a_device_may_change(
    llama_server: conftest.Engine, device: RpcDevice
) -> None:
    device.take(32 * MIB)
    for total, free in ((40, 8), (16, 0), (128, 96)):
        device.total_bytes = total * MIB
        (seen,) = listed(llama_server, device)
        assert (seen.total_bytes, seen.free_bytes) == (total * MIB, free * MIB)


def test_our_own_question_finds_them_too(llama_server: conftest.Engine) -> None:
    with rpc_device(64 * MIB) as first, rpc_device(96 * MIB) as second:
        second.take(MIB)
        assert asked(first, second) == (
            Device("RPC0", 64 * MIB, 64 * MIB, first.endpoint),
            Device("RPC1", 96 * MIB, 95 * MIB, second.endpoint),
        )


def test_a_device_that_is_gone_is_left_out_and_those_after_it_move_up(
    llama_server: conftest.Engine,
) -> None:
    """So that a name alone does not say which device it is: its address does."""
    with rpc_device(64 * MIB) as gone:
        pass
    with rpc_device(96 * MIB) as there:
        assert asked(gone, there) == (Device("RPC0", 96 * MIB, 96 * MIB, there.endpoint),)


def test_a_device_that_is_silent_costs_the_answer(llama_server: conftest.Engine) -> None:
    """As an rpc-server is that serves somebody else: nothing is known then, and no one waits."""
    engine = engines.find("auto")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"--rpc {address} .*gave no answer in 0.3 s"):
            engines.devices(engine, [address], answer_seconds=0.3)


def test_an_engine_that_knows_no_further_devices_is_named(llama_server: conftest.Engine) -> None:
    engine = engines.find("auto")
    without = replace(engine, flags=engine.flags - {"--rpc"})
    with pytest.raises(ConfigError, match=r"remove rpc from \[synapse\]"):
        engines.devices(without, ["127.0.0.1:1"])
    assert isinstance(engines.devices(without), tuple)


def test_a_reading_tells_of_each_device_by_asking_the_engine_once(
    llama_server: conftest.Engine,
) -> None:
    """The host tells of itself; a device that has gone is unknown, and none takes its place."""
    engine, times = engines.find("auto"), []

    def ask() -> tuple[Device, ...]:
        times.append(1)
        return engines.devices(engine, [first.endpoint, second.endpoint])

    with rpc_device(64 * MIB) as second:
        with rpc_device(96 * MIB) as first:
            devices = (*asked(first, second), cpu.read())
            first.take(6 * MIB)
            one, two, host = drivers.read_all(devices, {"us": [os.getpid()]}, ask)
            assert one == DeviceReading("RPC0", 96 * MIB, 90 * MIB)
            assert two == DeviceReading("RPC1", 64 * MIB, 64 * MIB)
            assert host.free_bytes
            assert dict(host.held_bytes)["us"] > MIB
            assert len(times) == 1
        one, two, host = drivers.read_all(devices, {}, ask)
        assert (one.free_bytes, two.free_bytes) == (None, None)
        assert first.endpoint in one.problem
        assert second.endpoint in two.problem
        assert host.free_bytes


# --- used ----------------------------------------------------------------------------------------


def test_a_model_on_a_device_answers_and_holds_what_its_log_says(
    llama_server: conftest.Engine,
    device: RpcDevice, serve: conftest.Serve, model: Path, tmp_path: Path,
) -> None:  # fmt: skip
    server = serve(model, *on(device))
    answer = server.ask("/completion", {"prompt": "the river", "n_predict": 4})
    assert answer["tokens_predicted"] == 4
    said = buffers((tmp_path / f"{model.name}.log").read_text())
    assert said.keys() == {"model", "KV", "compute"}
    assert abs(device.used_bytes - sum(said.values())) <= len(said) * _ROUNDING_BYTES
    (seen,) = listed(llama_server, device)
    assert seen.free_bytes == (64 * MIB - device.used_bytes) // MIB * MIB


def test_two_models_share_a_device(
    device: RpcDevice, serve: conftest.Serve, model: Path, tmp_path: Path
) -> None:
    """The real server serves one client at a time; the device serves each at once."""
    other = gguf_factory.write_model(tmp_path / "other.gguf", layers=4)
    one = serve(model, *on(device))
    alone = device.used_bytes
    two = serve(other, *on(device))
    assert device.used_bytes > 2 * alone
    for server in (one, two, one):
        server.ask("/completion", {"prompt": "the river", "n_predict": 2})


def test_a_model_is_split_over_two_devices(serve: conftest.Serve, model: Path) -> None:
    with rpc_device(64 * MIB) as first, rpc_device(64 * MIB) as second:
        server = serve(model, *on(first, second))
        server.ask("/completion", {"prompt": "the river", "n_predict": 2})
        assert first.used_bytes > 0
        assert second.used_bytes > 0


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_memory_is_back_when_a_model_has_ended(
    device: RpcDevice, serve: conftest.Serve, model: Path, how: signal.Signals
) -> None:
    server = serve(model, *on(device))
    assert device.used_bytes > MIB
    server.end(how)
    wait_until(lambda: device.used_bytes == 0, 5, "the memory was not given back")
    wait_until(lambda: device.connections == 0, 5, "the connection was not ended")


# --- full ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left_bytes", "said"),
    [
        (MIB // 16, "error loading model: unable to allocate RPC0"),
        (MIB // 5, "failed to allocate buffer for kv cache"),
        (MIB // 2, "failed to allocate compute pp buffers"),
    ],
    ids=["weights", "KV", "scratch"],
)
def test_a_device_that_is_full_is_a_real_out_of_memory(
    llama_server: conftest.Engine, device: RpcDevice, model: Path, left_bytes: int, said: str
) -> None:
    """The server ends with the words that it has for any device, whatever does not fit.

    The portable build then falls over, one time in five before the words are out.
    """
    device.take(64 * MIB - left_bytes)
    for _ in range(8 if llama_server.is_portable else 1):
        status, log = end_of(llama_server, model, *on(device))
        assert status == 1 or (llama_server.is_portable and status == 128 + signal.SIGSEGV)
        if said in log:
            break
    assert said in log
    kind, evidence = classify(Ending(status, log))
    assert kind is FailureClass.OUT_OF_MEMORY
    assert "allocate" in evidence
    wait_until(lambda: device.used_bytes == 0, 5, "the memory was not given back")


def test_a_model_that_is_refused_leaves_the_one_beside_it_alone(
    llama_server: conftest.Engine, device: RpcDevice, serve: conftest.Serve, model: Path
) -> None:
    server = serve(model, *on(device))
    held = device.used_bytes
    device.total_bytes = held
    status, _ = end_of(llama_server, model, *on(device))
    assert status == 1
    wait_until(lambda: device.used_bytes == held, 5, "what the refused one held")
    server.ask("/completion", {"prompt": "the river", "n_predict": 2})


def test_a_device_that_crashes_takes_its_models_with_it_and_is_there_again(
    llama_server: conftest.Engine, device: RpcDevice, serve: conftest.Serve, model: Path
) -> None:
    server = serve(model, *on(device))
    device.crash()
    wait_until(lambda: device.used_bytes == 0, 5, "the memory was not given back")
    with contextlib.suppress(OSError):
        server.post("/completion", {"prompt": "the river", "n_predict": 2})
    assert server.process.wait(10) == -signal.SIGABRT
    (seen,) = listed(llama_server, device)
    assert seen.free_bytes == 64 * MIB


# --- left ----------------------------------------------------------------------------------------


def test_nothing_is_left_of_a_device(llama_server: conftest.Engine) -> None:
    """Not even of one that is closed while clients hang on it."""
    before = set(psutil.Process().children())
    threads = threading.active_count()
    with rpc_device(64 * MIB) as device:
        listed(llama_server, device)
        address = device.endpoint.split(":")
        clients = [socket.create_connection((address[0], int(address[1]))) for _ in range(3)]
        wait_until(lambda: device.connections == 3, 10, "three clients")
        wait_until(lambda: len(set(psutil.Process().children()) - before) == 3, 10, "servers")
    assert set(psutil.Process().children()) == before
    assert threading.active_count() == threads
    for client in clients:
        with client:
            client.settimeout(5)
            assert client.recv(1) == b""


def test_where_there_is_no_rpc_server_the_test_is_skipped(tmp_path: Path) -> None:
    engine = tmp_path / "llama-server"
    engine.write_text("#!/bin/sh\n")
    engine.chmod(0o700)
    with pytest.raises(pytest.skip.Exception, match="rpc-server"):
        rpc_devices.program(str(engine))
