"""Which port each model answers on: as configured, as before, else the lowest free one. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from supervisor_synapse.core.catalog import Model
from supervisor_synapse.core.model import Problem
from supervisor_synapse.core.placement import Choice
from supervisor_synapse.core.settings import Settings


@dataclass(frozen=True, slots=True)
class Asking:
    """A model that asks for a port."""

    model: Model
    said: int | None  # by the settings
    may_run: bool


def choose(
    asking: Sequence[Asking],
    settings: Settings,
    earlier: Mapping[str, Choice],
    is_free: Callable[[int], bool],
) -> tuple[dict[str, int], list[Problem]]:
    """Ports by model key, and who got none.

    `earlier`: what was chosen before, by key. Those that may run are served first, so that a
    narrow range costs the others.
    """
    ports, problems = _as_said(asking)
    taken = set(ports.values())
    in_range = range(settings.first_port, settings.last_port + 1)
    for one in asking:
        before = earlier.get(one.model.key)
        if (
            before is not None and one.said is None and before.port in in_range
            and before.port not in taken and is_free(before.port)
        ):  # fmt: skip
            ports[one.model.key] = before.port
            taken.add(before.port)
    keys = {one.model.key for one in asking}
    absent = {choice.port for key, choice in earlier.items() if key not in keys}
    # A model that is away for a while finds its port free, as long as there are others.
    in_order = sorted((port for port in in_range if port not in taken), key=lambda p: p in absent)
    free = (port for port in in_order if is_free(port))
    without = [one for one in asking if one.model.key not in ports and one.said is None]
    for one in sorted(without, key=lambda one: not one.may_run):
        port = next(free, None)
        if port is None:
            problems.append(_none_left(one.model, settings))
        else:
            ports[one.model.key] = port
    return ports, problems


def _as_said(asking: Sequence[Asking]) -> tuple[dict[str, int], list[Problem]]:
    """Ports that the settings give; one that is given twice is the first one's."""
    ports: dict[str, int] = {}
    problems: list[Problem] = []
    for one in asking:
        if one.said is not None and one.said in ports.values():
            problems.append(
                Problem(
                    one.model.name, f"port {one.said} is given to two models",
                    "give each a port of its own in synapse.conf, or none",
                )
            )  # fmt: skip
        elif one.said is not None:
            ports[one.model.key] = one.said
    return ports, problems


def _none_left(model: Model, settings: Settings) -> Problem:
    return Problem(
        model.name, f"no port left in {settings.first_port}-{settings.last_port}",
        "widen port_range in synapse.conf",
    )  # fmt: skip
