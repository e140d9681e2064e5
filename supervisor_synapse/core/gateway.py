"""What the gateway is told: which word of a request means which model, and what becomes of a
request whose model does not answer just now.

A word is a program's name, its alias, its repo, or a tier. A name always means its own model; an
alias or a repo that several have, and a tier, mean the best of them: one that serves before one
that is on its way before one that has to be asked for, then by priority.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

from supervisor_synapse.core.model import Phase, Program, Row, Tier

# What may stand as a key of one of HAProxy's maps: no blank, no control character, no comment.
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,299}")
_RANKS = {"serve": 0, "hold": 1, "avoid": 2, "demand": 3, "refuse": 4}
_LONGEST_REASON = 300


@dataclass(frozen=True, slots=True)
class GatewayPaths:
    """The files and sockets that the gateway's configuration names."""

    socket: str
    again_socket: str
    supervisord_socket: str
    routes_map: str
    models_map: str
    lua: str


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where one model's server listens, for the gateway."""

    name: str
    host: str
    port: int

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a request for one model: `serve`, `hold`, `avoid`, `demand` or `refuse`.

    `word` is the fallback that serves in its place, or the reason of a refusal.
    """

    kind: str
    word: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.word}".rstrip()


@dataclass(frozen=True, slots=True)
class Tables:
    """The gateway's two maps: word → program, program → verdict; and what is listed."""

    routes: Mapping[str, str]
    models: Mapping[str, str]


def verdict(row: Row, *, has_way_back: bool, fallback: str = "") -> Verdict:
    """What becomes of a request for a model that is as `row` says.

    `has_way_back`: whether a model that is on its way out, or has ended, comes back by itself (a
    restart, an update, a swap that is undone). `fallback`: who serves in its place now.
    """
    match row.phase:
        case Phase.READY:
            return Verdict("serve", fallback)
        case Phase.LOADING | Phase.PENDING | Phase.BACKOFF:
            return Verdict("hold")
        case Phase.UNHEALTHY:  # it may answer /health, and nothing else
            return Verdict("avoid")
        case Phase.DRAINING | Phase.STOPPING | Phase.VERIFYING:
            return Verdict("hold")
        case Phase.DEFERRED:
            return Verdict("demand")
        case Phase.STOPPED:
            if has_way_back:
                return Verdict("demand")
            return Verdict("refuse", _reason(row))
        case Phase.DISABLED | Phase.FAILED:
            return Verdict("refuse", _reason(row))
    assert_never(row.phase)


def _reason(row: Row) -> str:
    """One line of plain characters: it stands in a map and in a reply."""
    text = f"{row.phase.value}: {row.reason}" if row.reason else row.phase.value
    plain = "".join(c if c.isascii() and c.isprintable() else "?" for c in text)
    return plain[:_LONGEST_REASON]


def tables(
    programs: Sequence[Program], rows: Iterable[Row], verdicts: Mapping[str, Verdict]
) -> Tables:
    """What the maps shall hold now; `verdicts` has one for each row."""
    shown = {row.name: row for row in rows}
    known = [program for program in programs if program.name in shown]
    best = sorted(known, key=lambda one: (_RANKS[verdicts[one.name].kind], one.priority, one.name))
    routes: dict[str, str] = {}
    for program in best:
        for word in (program.alias, program.repo or "", program.alias.lower()):
            _add(routes, word, program.name)
    for tier in Tier:
        for program in best:
            if program.tier is tier and verdicts[program.name].kind != "refuse":
                _add(routes, tier.value, program.name)
    routes |= {program.name: program.name for program in known}
    models = {name: str(one) for name, one in verdicts.items() if name in shown}
    for number, program in enumerate(known, 1):
        listed = _listed(program, shown[program.name], routes)
        models[f"={program.name}"] = json.dumps(listed, separators=(",", ":"))
        models[f"*{number}"] = program.name
    return Tables(routes, models)


def _add(routes: dict[str, str], word: str, name: str) -> None:
    if _WORD.fullmatch(word):
        routes.setdefault(word, name)


def _listed(program: Program, row: Row, routes: Mapping[str, str]) -> dict[str, object]:
    """One object of /v1/models, with its state beside what OpenAI's has."""
    words = sorted(word for word, name in routes.items() if name == program.name != word)
    return {
        "id": program.name, "object": "model", "created": 0,
        "owned_by": (program.repo or "local").split("/", 1)[0], "aliases": words,
        "tier": program.tier.value, "phase": row.phase.value, "context": row.context,
    }  # fmt: skip
