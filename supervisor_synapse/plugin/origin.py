"""Refuses what another site's page has a browser ask of supervisord, inside supervisord.

A browser that knows supervisord's password sends it along with every request, also one that a
page of another site made up. It says where such a request comes from, in headers that no page can
change: `Sec-Fetch-Site`, `Origin`, `Referer`. Requests that may change something and come from
elsewhere are answered with 403: all of XML-RPC, and those of the web pages that are POSTs or carry
an `action`. Programs send no such headers, and are never affected.

`same-site` is elsewhere too: a model's own page differs from ours by its port alone.

Two methods of supervisor's are wrapped, once for the process, as a reload keeps modules loaded:
`continue_request` of the handlers of XML-RPC and of the pages, which run after the password was
checked and the body was read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qs, urlsplit

from supervisor.web import supervisor_ui_handler
from supervisor.xmlrpc import supervisor_xmlrpc_handler

_MARK = "_asked_by_synapse_where_from"

# What a browser says of requests of this origin, and of those that a person made by hand.
_OWN = frozenset({"same-origin", "none"})


def install() -> None:
    """Guard XML-RPC and the stock pages from now on; to say so twice is no error."""
    _guard(supervisor_xmlrpc_handler, lambda request: True)
    _guard(supervisor_ui_handler, _may_change)


def _guard(handler: Any, is_guarded: Callable[[Any], bool]) -> None:
    if _MARK in vars(handler):
        return
    continue_request = handler.continue_request

    @functools.wraps(continue_request)
    def guarded(self: Any, data: Any, request: Any) -> Any:
        if is_guarded(request) and is_foreign(request.header):
            request.error(403)
            return None
        return continue_request(self, data, request)

    handler.continue_request = guarded
    setattr(handler, _MARK, True)


def _may_change(request: Any) -> bool:
    """Whether one of supervisor's pages would act upon it; the stock ones do so upon a GET."""
    _, _, query, _ = request.split_uri()
    return request.command != "GET" or "action" in parse_qs((query or "")[1:])


def is_foreign(lines: Iterable[str]) -> bool:
    """Whether the lines of a request's header say that a page of another origin made it."""
    said = headers(lines)
    site = said.get("sec-fetch-site")
    if site is not None:
        return site.lower() not in _OWN
    origin = said.get("origin", said.get("referer"))
    return origin is not None and _host_of(origin) not in _own_hosts(said)


def headers(lines: Iterable[str]) -> dict[str, str]:
    """Name, in lower case, to value; of a header that stands twice the first counts."""
    found: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        found.setdefault(name.strip().lower(), value.strip())
    return found


def _own_hosts(said: dict[str, str]) -> set[str]:
    """As the browser knows us. No page can have it send X-Forwarded-Host without asking first."""
    names = (said.get("host"), said.get("x-forwarded-host"))
    return {name.lower() for name in names if name}


def _host_of(origin: str) -> str:
    """Host and port; empty for what has none, as `null`."""
    try:
        return urlsplit(origin).netloc.rpartition("@")[2].lower()
    except ValueError:
        return ""
