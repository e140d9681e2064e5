"""A supervisord that answers XML-RPC on a unix socket with what a test wants to be said."""

from __future__ import annotations

import contextlib
import socketserver
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xmlrpc.server import SimpleXMLRPCDispatcher, SimpleXMLRPCRequestHandler

from supervisor_synapse.core.model import ProcessState


def process_info(name: str, state: ProcessState, pid: int = 0) -> dict[str, Any]:
    """One entry of getAllProcessInfo."""
    return {
        "name": name, "group": name, "state": int(state), "pid": pid, "start": 0, "stop": 0,
        "now": 0, "exitstatus": 0, "spawnerr": "", "logfile": "", "description": "",
    }  # fmt: skip


class _Handler(SimpleXMLRPCRequestHandler):
    rpc_paths = ("/RPC2",)
    disable_nagle_algorithm = False  # a unix socket has none

    def address_string(self) -> str:
        return "unix"


class _Server(socketserver.UnixStreamServer, SimpleXMLRPCDispatcher):
    logRequests = False  # noqa: N815 - the base's naming
    _send_traceback_header = False

    def __init__(self, path: Path) -> None:
        socketserver.UnixStreamServer.__init__(self, str(path), _Handler)
        SimpleXMLRPCDispatcher.__init__(self)


@contextlib.contextmanager
def answering(path: Path, answers: Mapping[str, object]) -> Iterator[None]:
    """Answer each method with its value, and others with a fault."""
    server = _Server(path)
    for name, value in answers.items():
        server.register_function(lambda *_, value=value: value, name)  # type: ignore[misc]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    path.chmod(0o700)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
