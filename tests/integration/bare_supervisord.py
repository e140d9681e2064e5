"""A real supervisord with our plugin and programs of one's choice, and no listener: what shall be
shown is published by the test itself.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import xmlrpc.client
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from supervisor_synapse.adapters import snapshots
from supervisor_synapse.core.model import Snapshot
from tests.integration.harness import wait_until
from tests.ports import free_ports

LOGIN = ("synapse", "pass-word")
_START_SECONDS = 20.0
_IDLE = "command=/bin/synapse-run\nautostart=false"


class BareSupervisord:
    """`programs`: of supervisord's, by name what stands in the section of each."""

    def __init__(self, programs: Mapping[str, str]) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="syn", dir="/tmp"))
        self.port = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        self._configure(programs)
        supervisord = Path(sys.executable).parent / "supervisord"
        self._process = subprocess.Popen(
            [str(supervisord), "-c", str(self.root / "supervisord.conf")],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=self.root,
        )  # fmt: skip
        self.process = psutil.Process(self._process.pid)
        try:
            wait_until(self._answers, _START_SECONDS, "supervisord answers")
        except BaseException:
            self.close()
            raise

    def _configure(self, programs: Mapping[str, str]) -> None:
        user, password = LOGIN
        sections = "\n".join(f"[program:{name}]\n{said}" for name, said in programs.items())
        (self.root / "supervisord.conf").write_text(
            f"[inet_http_server]\nport=127.0.0.1:{self.port}\nusername={user}\n"
            f"password={password}\n"
            f"[supervisord]\nlogfile={self.root}/log\npidfile={self.root}/pid\nnodaemon=true\n"
            f"childlogdir={self.root}\n"
            "[rpcinterface:supervisor]\n"
            "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface\n"
            "[rpcinterface:synapse]\n"
            "supervisor.rpcinterface_factory=supervisor_synapse.plugin.rpc:make_rpcinterface\n"
            f"{sections}\n"
        )

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), self.rpc() as server:
            return bool(server.supervisor.getState())
        return False

    def rpc(self) -> xmlrpc.client.ServerProxy:
        """XML-RPC over TCP with the password; to be used in a `with`."""
        return xmlrpc.client.ServerProxy(f"http://{':'.join(LOGIN)}@127.0.0.1:{self.port}/RPC2")

    def publish(self, snapshot: Snapshot, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        """As the listener does."""
        with self.rpc() as server:
            server.synapse.publish(snapshots.dump(snapshot))
            server.synapse.record(json.dumps(list(lines)), True)

    def close(self) -> None:
        """Ends it, and all its programs."""
        self._process.terminate()
        self._process.wait(20)
        shutil.rmtree(self.root, ignore_errors=True)


@contextlib.contextmanager
def bare_supervisord(programs: Iterable[str] = (), said: str = _IDLE) -> Iterator[BareSupervisord]:
    """One that ends with the test; none of its programs runs where nothing else is said."""
    host = BareSupervisord(dict.fromkeys(programs, said))
    try:
        yield host
    finally:
        host.close()
