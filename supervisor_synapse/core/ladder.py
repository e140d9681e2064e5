"""The ladder of a model: ways to serve it that take less and less memory, best first. Pure.

Rung 0 is what was configured or chosen. Then come smaller contexts, fewer layers on the devices
down to none, smaller quantizations of the same model, and the fallback model: all on the same
port, under the same alias. What is free at the moment plays no part, so that the ladder is the
same whenever it is looked at.

Each rung takes strictly less than the one before it: on the devices, as long as the same files
are served (what leaves a device goes to the host); altogether, where it serves other files, or
where nothing lies on a device any more. A rung that does not is left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

from supervisor_synapse.core.candidates import Candidate, family_of, halved
from supervisor_synapse.core.estimate import HOST
from supervisor_synapse.core.model import Program, Variant
from supervisor_synapse.core.placement import Placement, Search, scaled

MOST_RUNGS = 8
_LEAST_CONTEXT = 2048  # where the settings say a larger one
_QUARTERS_OF_THE_LAYERS = (3, 2, 1, 0)

_T = TypeVar("_T")


class _Rung(NamedTuple):
    """One rung before it is worked out: what `search` serves, and how."""

    label: str
    search: Search
    placement: Placement


def of_fleet(
    fleet: Mapping[str, Search], placed: Mapping[str, Placement]
) -> dict[str, tuple[Variant, ...]]:
    """The ladder of each model, by key; `placed`: how each is served where it can be."""
    families: dict[str, list[Candidate]] = {}
    for search in fleet.values():
        families.setdefault(family_of(search.candidate.model), []).append(search.candidate)
    by_name = {search.candidate.model.name: search.candidate for search in fleet.values()}
    found = {}
    for key, own in fleet.items():
        family = families[family_of(own.candidate.model)]
        smaller = [own.for_other(_in_place_of(own, one)) for one in _smaller(own, family)]
        other = by_name.get(own.candidate.said.fallback or "")
        fallback = None
        if other is not None and other is not own.candidate:
            fallback = (own.for_other(_in_place_of(own, other)), placed[other.model.key])
        found[key] = rungs(own, placed[key], smaller, fallback)
    return found


def _smaller(own: Search, family: Iterable[Candidate]) -> list[Candidate]:
    """Smaller quantizations, the next one first; not those that the settings disable."""
    model = own.candidate.model
    found = [
        one
        for one in family
        if one.model.size_bytes < model.size_bytes
        and one.model.role is model.role
        and one.said.enabled is not False
    ]
    return sorted(found, key=lambda one: one.order, reverse=True)


def rungs(
    own: Search,
    chosen: Placement,
    smaller: Sequence[Search] = (),
    fallback: tuple[Search, Placement] | None = None,
) -> tuple[Variant, ...]:
    """At most `MOST_RUNGS` ways to serve a model; none where there is but one.

    `smaller`: smaller quantizations of it, the largest first. `fallback`: another model, as it was
    chosen. These serve under the alias and on the port of `own`.
    """
    contexts = [
        _Rung(f"context {context}", own, chosen.with_context(context))
        for context in halved(chosen.context, _floor(own))[1:]
    ]
    lowest = contexts[-1].placement if contexts else chosen
    layers = [_Rung(_share(own, placement), own, placement) for placement in _fewer_layers(lowest)]
    quantizations = [_quantization(search, chosen) for search in smaller]
    last = [] if fallback is None else [_fallback(*fallback)]
    places = MOST_RUNGS - 1 - len(last)
    picked = _thinned((contexts, layers, quantizations), places)
    every = [_Rung("as configured", own, chosen), *picked, *last]
    descending = _descending(map(_variant, every))
    return tuple(descending) if len(descending) > 1 else ()


def _in_place_of(own: Search, other: Candidate) -> Candidate:
    """Another model, to be served under the alias of one, and to sleep when that one would."""
    sleep = own.candidate.said.sleep_idle_seconds
    said = replace(other.said, alias=own.candidate.alias, sleep_idle_seconds=sleep)
    return replace(other, said=said)


def fallback_of(program: Program) -> str:
    """The model that the last rung serves, where that is the fallback; else ""."""
    if not program.ladder or program.fallback is None:
        return ""
    is_last = program.ladder[-1].label == _label_of_fallback(program.fallback)
    return program.fallback if is_last else ""


def name_of(variant: Variant) -> str:
    """Names what a rung says, but for the port: the same name, the same rung."""
    at = variant.arguments.index("--port") + 1
    words = (variant.key, *variant.arguments[:at], *variant.arguments[at + 1 :])
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]


def _floor(search: Search) -> int:
    """The smallest context that is still of use."""
    said = search.candidate.said.context
    return search.contexts[-1] if said is None else min(said, _LEAST_CONTEXT)


def _fewer_layers(placement: Placement) -> list[Placement]:
    counts = dict.fromkeys(placement.layers * part // 4 for part in _QUARTERS_OF_THE_LAYERS)
    return [_with_layers(placement, count) for count in counts if count < placement.layers]


def _with_layers(placement: Placement, layers: int) -> Placement:
    if not layers:
        return Placement(placement.context)
    split = scaled(placement.split, layers) if placement.split else ()
    return Placement(placement.context, placement.devices, layers, split)


def _share(search: Search, placement: Placement) -> str:
    if not placement.devices:
        return "on the host"
    return f"{placement.layers} of {search.candidate.all_layers} layers on {placement.where}"


def _quantization(search: Search, chosen: Placement) -> _Rung:
    """With its smallest context, on the same devices."""
    candidate = search.candidate
    context = _floor(search)
    placement = _with_layers(chosen, min(chosen.layers, candidate.all_layers))
    label = f"{candidate.model.name} at context {context}"
    return _Rung(label, search, placement.with_context(context))


def _fallback(search: Search, placement: Placement) -> _Rung:
    return _Rung(_label_of_fallback(search.candidate.model.name), search, placement)


def _label_of_fallback(name: str) -> str:
    return f"fallback {name}"


def _thinned(segments: Sequence[Sequence[_T]], places: int) -> list[_T]:
    """So many over all segments: the longest gives way; of each the last one stays."""
    counts = [len(segment) for segment in segments]
    while sum(counts) > places:
        counts[counts.index(max(counts))] -= 1
    return [
        segment[len(segment) * place // count - 1]
        for segment, count in zip(segments, counts, strict=True)
        for place in range(1, count + 1)
    ]


def _variant(rung: _Rung) -> Variant:
    model = rung.search.candidate.model
    found = rung.search.configuration(rung.placement)
    return Variant(
        label=rung.label, key=model.key, context=rung.placement.context,
        device=rung.placement.where, arguments=found.arguments, estimate=found.estimate,
        model_path=model.path, projector_path=model.projector, shards=model.shards,
    )  # fmt: skip


def _descending(variants: Iterable[Variant]) -> list[Variant]:
    kept: list[Variant] = []
    taken: _Taken | None = None
    for variant in variants:
        takes = _takes(variant)
        if taken is None or _is_less(takes, taken):
            kept.append(variant)
            taken = takes
    return kept


class _Taken(NamedTuple):
    """What a rung takes, in bytes, with the files of which model."""

    key: str
    on_devices: int
    on_host: int


def _takes(variant: Variant) -> _Taken:
    on_host = on_devices = 0
    for part in variant.estimate.parts:
        if part.device == HOST:
            on_host += part.total_bytes
        else:
            on_devices += part.total_bytes
    return _Taken(variant.key, on_devices, on_host)


def _is_less(below: _Taken, above: _Taken) -> bool:
    if below.key == above.key and above.on_devices:
        return below.on_devices < above.on_devices
    return below.on_devices + below.on_host < above.on_devices + above.on_host


def takes_less(below: Variant, above: Variant) -> bool:
    """Whether a rung may stand below another."""
    return _is_less(_takes(below), _takes(above))
