"""Posts a notice to a URL. What goes wrong is a value; see hooks.py.

Only who posts imports this: requests takes 4 MiB of the listener's memory.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3.exceptions
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from supervisor_synapse.adapters.hooks import Outcome, read_headers
from supervisor_synapse.core.failures import printable
from supervisor_synapse.errors import ConfigError

_READ_ANSWER_BYTES = 512
_PASSING = frozenset({408, 425, 429, *range(500, 600)})  # statuses that may be another one soon


def post(url: str, header_file: str, text: str, seconds: float) -> Outcome:
    """Send `text` by POST, within so long in all.

    To `url` and nowhere else: no redirect is followed, no proxy used, and TLS is verified.
    """
    try:
        headers = read_headers(Path(header_file)) if header_file else {}
    except ConfigError as error:
        return Outcome(str(error))
    with _session() as session, _Deadline(seconds) as deadline:
        session.headers.update({**headers, "Content-Type": "application/json"})
        try:
            with session.post(
                url, text.encode("ascii"), allow_redirects=False, timeout=seconds, stream=True
            ) as answer:
                outcome = _judged(answer)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            is_late = deadline.is_over or isinstance(error, requests.Timeout)
            return _no_answer(url, error, seconds if is_late else None)
        except ValueError as error:  # what requests thinks is no address
            return Outcome(f"{_place(url)}: {type(error).__name__}")
        # One that was cut off in its headers looks like a whole one.
        return _too_late(url, seconds) if deadline.is_over and not outcome.problem else outcome


def _no_answer(url: str, error: Exception, seconds: float | None) -> Outcome:
    """`seconds`: how long was waited, where that was too long."""
    if seconds is not None:
        return _too_late(url, seconds)
    is_for_good = isinstance(error, requests.exceptions.SSLError | requests.exceptions.InvalidURL)
    return Outcome(f"{_place(url)}: {_cause(error)}", may_pass=not is_for_good)


def _too_late(url: str, seconds: float) -> Outcome:
    return Outcome(f"{_place(url)} gave no answer within {seconds:g} s", may_pass=True)


def _judged(answer: requests.Response) -> Outcome:
    status = answer.status_code
    if 200 <= status < 300:
        return Outcome()
    said = printable(_first_bytes(answer).decode("utf-8", "replace"))
    more = "; redirects are not followed" if 300 <= status < 400 else ""
    place = _place(str(answer.url))
    return Outcome(f"{place} answered {status}{more}", said, may_pass=status in _PASSING)


def _first_bytes(answer: requests.Response) -> bytes:
    try:
        return bytes(next(answer.iter_content(_READ_ANSWER_BYTES), b""))
    except (requests.RequestException, OSError):
        return b""


def _place(url: str) -> str:
    """Without the path, which may be a secret by itself."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _cause(error: BaseException) -> str:
    """The innermost words, without the URL that those around it quote."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    words = error.strerror if isinstance(error, OSError) and error.strerror else ""
    return printable(words or type(error).__name__)


def _session() -> requests.Session:
    session = requests.Session()
    session.trust_env = False  # no proxy and no .netrc of the environment
    adapter = _Adapter()
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


# --- one deadline for a whole exchange, where requests has a timeout for each piece of it --------

_thread = threading.local()  # .deadline of what this thread asks


class _Deadline:
    """After it the connections of this thread are shut down: whoever reads meets their end."""

    def __init__(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self.is_over = False

    def __enter__(self) -> _Deadline:
        _thread.deadline = self
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            for one in self._sockets:
                one.close()
            self._sockets.clear()

    def hold(self, opened: socket.socket) -> None:
        """By a second descriptor: TLS takes the first one away from its socket."""
        with self._lock:
            self._sockets.append(opened.dup())
        if self.is_over:
            self._end()

    def _end(self) -> None:
        self.is_over = True
        with self._lock:
            for one in self._sockets:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)


class _Noted:
    """A connection whose socket can be shut down by another thread, TLS or not."""

    def _new_conn(self) -> socket.socket:
        opened: socket.socket = super()._new_conn()  # type: ignore[misc]  # urllib3's, beside us
        _thread.deadline.hold(opened)
        return opened


class _Connection(_Noted, HTTPConnection):
    pass


class _TLSConnection(_Noted, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TLSPool(HTTPSConnectionPool):
    ConnectionCls = _TLSConnection


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}
