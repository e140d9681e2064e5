"""A reload is refused where supervisord would not survive it, and only there.

With a real supervisord: tests/integration/test_plugin.py.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from supervisor.rpcinterface import SupervisorNamespaceRPCInterface
from supervisor.states import SupervisorStates
from supervisor.xmlrpc import Faults, RPCError, traverse

from supervisor_synapse.plugin import reload_guard


class Host:
    """As much of a supervisord as a reload needs."""

    def __init__(self, main: Path) -> None:
        self.signals: list[int] = []
        self.logged: list[str] = []
        self.options = SimpleNamespace(
            configfile=str(main),
            mood=SupervisorStates.RUNNING,
            logger=SimpleNamespace(critical=self.logged.append),
            get_signal=lambda: self.signals.pop(0) if self.signals else None,
        )
        self.rpc = SupervisorNamespaceRPCInterface(self)

    def reload(self) -> object:
        """As through XML-RPC."""
        return traverse(SimpleNamespace(supervisor=self.rpc), "supervisor.restart", ())


@pytest.fixture
def main(tmp_path: Path) -> Path:
    path = tmp_path / "supervisord.conf"
    path.write_text(f"[supervisord]\nlogfile={tmp_path}/s.log\n")
    return path


@pytest.fixture(autouse=True)
def unguarded() -> Iterator[None]:
    """Each test begins with supervisor's own method."""
    own = SupervisorNamespaceRPCInterface.restart
    yield
    SupervisorNamespaceRPCInterface.restart = own


def guarded(main: Path) -> Host:
    host = Host(main)
    reload_guard.install(host)
    return host


def test_a_reload_goes_on_where_nothing_is_broken(main: Path) -> None:
    host = guarded(main)
    assert host.reload() is True
    assert host.options.mood == SupervisorStates.RESTARTING
    assert host.logged == []


def test_a_broken_file_is_named_and_the_mood_stays(main: Path) -> None:
    main.write_text("[supervisord]\nwords\n")
    host = guarded(main)
    with pytest.raises(RPCError) as caught:
        host.reload()
    assert caught.value.code == Faults.CANT_REREAD
    assert f"{main}, line 2: " in caught.value.text
    assert host.options.mood == SupervisorStates.RUNNING
    assert f"{main}, line 2: " in host.logged[0]


def test_of_many_broken_files_some_are_named(main: Path) -> None:
    main.write_text(main.read_text() + "[include]\nfiles=*.ini\n")
    for number in range(9):
        main.with_name(f"{number}.ini").write_text("words")
    with pytest.raises(RPCError) as caught:
        guarded(main).reload()
    assert caught.value.text.count("words") == 5
    assert "; and 4 more; " in caught.value.text


def test_to_guard_twice_is_to_guard_once(main: Path) -> None:
    host = guarded(main)
    once = SupervisorNamespaceRPCInterface.restart, host.options.get_signal
    reload_guard.install(host)
    assert (SupervisorNamespaceRPCInterface.restart, host.options.get_signal) == once


def test_a_signal_for_a_reload_is_dropped_and_no_other(main: Path) -> None:
    main.write_text("words")
    host = guarded(main)
    host.signals = [signal.SIGHUP, signal.SIGTERM, signal.SIGCHLD]
    assert [host.options.get_signal() for _ in range(4)] == [
        None, signal.SIGTERM, signal.SIGCHLD, None,
    ]  # fmt: skip
    assert len(host.logged) == 1
    main.write_text(f"[supervisord]\nlogfile={main.parent}/s.log\n")
    host.signals = [signal.SIGHUP]
    assert host.options.get_signal() == signal.SIGHUP


def test_a_supervisord_on_its_way_out_is_left_alone(main: Path) -> None:
    main.write_text("words")
    host = guarded(main)
    host.options.mood = SupervisorStates.SHUTDOWN
    with pytest.raises(RPCError) as caught:
        host.reload()
    assert caught.value.code == Faults.SHUTDOWN_STATE
    assert host.logged == []


def test_a_check_that_fails_by_itself_lets_the_reload_go_on(main: Path) -> None:
    host = guarded(main)
    host.options.configfile = None  # started in some way that we do not know
    assert host.reload() is True
    assert "cannot check the files" in host.logged[0]


def test_what_the_method_says_of_itself_stays(main: Path) -> None:
    """system.methodHelp reads it; system.methodSignature would fail without."""
    guarded(main)
    assert "@return boolean" in str(SupervisorNamespaceRPCInterface.restart.__doc__)
