"""Checks of ports and addresses, and of supervisord's own web server."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from supervisor_synapse.adapters import haproxy, sockets
from supervisor_synapse.adapters.haproxy import Haproxy
from supervisor_synapse.core.findings import Finding, error, fine, note, warning
from supervisor_synapse.doctor.case import Case

_ANY_HOST = frozenset({"", "*", "0.0.0.0", "::"})  # noqa: S104 - looked for, not bound
_FEW_PORTS = 3


def check_ports(case: Case) -> Iterator[Finding]:
    """Whether there are ports left, and who else has those of our models."""
    listeners = sockets.listeners()
    if listeners is None:
        yield note("ports-hidden", "ports", "who listens is not for us to see on this system")
        return
    ours = {program.name: program.port for program in case.registry.programs}
    for block in case.blocks:
        if block.server and block.served is not None and block.served.port:
            ours[block.name] = block.served.port
    for name, port in ours.items():
        for listener in listeners:
            if listener.port == port and not _is_ours(case, name, listener.pid):
                yield warning(
                    "port-taken", name,
                    f"its port {port} is taken by {sockets.describe(listener.pid)}",
                    "end that; or leave it: when it starts, the model takes another port, unless "
                    "you chose this one",
                )  # fmt: skip
                break
    yield from _range(case, {listener.port for listener in listeners}, set(ours.values()))


def _is_ours(case: Case, name: str, pid: int | None) -> bool:
    """Whether a process belongs to the run of a model, orphaned or not."""
    found = case.process(pid) if pid is not None else None
    if found is None:
        return False
    if case.record_of(found) == str(case.deployment.record(name)):
        return True
    table = case.supervisord.processes or {}
    return name in table and table[name].pid > 0 and case.is_below(found, table[name].pid)


def _range(case: Case, taken: set[int], ours: set[int]) -> Iterator[Finding]:
    first, last = case.settings.first_port, case.settings.last_port
    ports = set(range(first, last + 1))
    left = len(ports - taken - ours)
    where, told = f"{first}-{last}", f"{left} of {len(ports)} ports are left for new models"
    remedy = "widen port_range in synapse.conf, then `synapse discover`"
    if left == 0:
        yield error("ports-exhausted", where, told, remedy)
    elif left < _FEW_PORTS:
        yield warning("ports-few", where, told, remedy)
    else:
        yield fine(where, told)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; a name counts if it is localhost."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_hosts(case: Case) -> Iterator[Finding]:
    """Models that others on the network can reach, and without a key."""
    open_to_all = []
    for block in case.blocks:
        served = block.served
        if not block.server or served is None or is_loopback(served.host):
            continue
        if served.api_key_file is None:
            open_to_all.append((block.name, served.host))
        else:
            yield note("host-not-loopback", block.name, f"answers on {served.host}, with a key")
    for name, host in open_to_all:
        yield warning(
            "host-open", name, f"answers on {host} to everybody on the network, without a key",
            "host = 127.0.0.1, or args = --api-key-file FILE (mode 0600) in its [model:...]",
        )  # fmt: skip
    host = case.settings.host
    if not is_loopback(host) and not case.blocks:
        yield warning(
            "host-open", "synapse.conf", f"host = {host}: models would answer to the network",
            "host = 127.0.0.1, or args = --api-key-file FILE in [model:*]",
        )  # fmt: skip
    yield fine("host", host)


def check_web_server(case: Case) -> Iterator[Finding]:
    """[inet_http_server]: who can reach it, who may use it, what a browser may be made to do."""
    said = case.options_of("inet_http_server")
    if said is None:
        yield fine("inet_http_server", "is off; supervisord is reached by its socket alone")
        return
    where = f"{case.deployment.main_config} [inet_http_server]"
    host, _, port = said.get("port", "").rpartition(":")
    is_near = bool(host) and is_loopback(host.strip("[]"))
    has_password = bool(said.get("password"))
    if not has_password:
        reach = "every program and user here" if is_near else "everybody on the network"
        yield error(
            "web-no-password", where, f"{reach} may start and stop programs by port {port}",
            "set username and password there, then `supervisorctl reload`",
        )  # fmt: skip
    if not is_near:
        shown = "every address" if host in _ANY_HOST else host
        yield warning(
            "web-not-loopback", where,
            f"listens on {shown}; all that is sent, a password too, can be read on the network",
            f"port = 127.0.0.1:{port}, reached from elsewhere through ssh -L or a TLS proxy",
        )  # fmt: skip
    yield note("web-cross-site", where, _CROSS_SITE, _CROSS_SITE_MEND)


_CROSS_SITE = (
    "a browser that is logged in here sends the password with whatever a page of another site has "
    "it ask. The plugin refuses that where the browser says where a request comes from: XML-RPC, "
    "every POST, and the actions of supervisord's own page (index.html?action=...). It cannot "
    "where the browser does not say: an old one, or a GET without a referrer to another address "
    "than 127.0.0.1. Such a request can stop and start programs; its answer cannot be read"
)
_CROSS_SITE_MEND = (
    "leave the server off where the socket does (supervisorctl needs no port); else keep it on "
    "127.0.0.1, with a password, and close the browser after use"
)


def check_gateway(case: Case) -> Iterator[Finding]:
    """One address for all models needs HAProxy; without it everything else works."""
    gateway, found = case.settings.gateway, haproxy.find()
    if gateway.enabled is False:
        yield fine("gateway", "is off")
        return
    if found is None or found.problem:
        yield _no_gateway(found, is_wanted=gateway.enabled is True)
        return
    yield fine("haproxy", found.path)
    if not is_loopback(gateway.host) and not gateway.api_key_file:
        yield warning(
            "gateway-open", "[gateway]",
            f"bind is {gateway.host}, and no key is asked for: everybody on the network may use "
            "all models", "set api_key_file, or bind = 127.0.0.1:8080",
        )  # fmt: skip


def _no_gateway(found: Haproxy | None, *, is_wanted: bool) -> Finding:
    mend = "install haproxy 2.6 or newer (built with Lua), or set enabled = false in [gateway]"
    if found is not None:
        return (error if is_wanted else warning)(
            "gateway-unusable", found.path, f"cannot be the gateway: {found.problem}", mend
        )
    if is_wanted:
        return error("gateway-unusable", "[gateway]", "is enabled; haproxy is not on PATH", mend)
    return note(
        "gateway-absent",
        "haproxy",
        "is not on PATH; only the optional gateway (one endpoint for all models) needs it",
    )
