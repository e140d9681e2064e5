"""Where one model lies, with how many of its layers and how much context: the best that fits.

What is tried, in this order; the first that fits is taken:

1. all layers on one device, with the largest context for which there is one, down to the tier's
   floor. Of several devices: one that others of ours use already, the one that is left with the
   least room; else the roomiest. So devices fill up one after another, and the rest stay free;
2. all layers split over as few devices as it takes, the roomiest, by their room;
3. as many layers as fit on devices, the rest on the host; then the largest context with which as
   many still fit;
4. the host alone.

So a whole offload with the floor context comes before a part of the layers with more. What the
settings say outright is kept: then only that is tried. Every device counts, and so does the host,
since a model on a device takes of the host's memory too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import NamedTuple

from supervisor_synapse.core.arguments import (
    Extent,
    Serving,
    load_of,
    naming_words,
    placing_words,
    prompt_cache_words,
    standing_words,
)
from supervisor_synapse.core.candidates import Candidate
from supervisor_synapse.core.catalog import Model
from supervisor_synapse.core.estimate import HOST, Load, estimate, margin_of, of_profile
from supervisor_synapse.core.layers import profile
from supervisor_synapse.core.model import Device, Engine, Estimate
from supervisor_synapse.core.settings import Settings

# How often a split is mended before its devices are given up.
_MOST_MENDINGS = 6
# The engine's name for devices that are reached through `--rpc`.
_RPC = "RPC"
# Backends whose devices are a part of the host's own memory.
_OF_THE_HOST = ("MTL", "Metal")

# What is known of a model with these arguments; the formula tells what nobody measured.
Known = Callable[[Model, tuple[str, ...], Estimate], Estimate | None]


def nothing_known(_model: Model, _arguments: tuple[str, ...], _formula: Estimate) -> None:
    """No model was ever loaded."""


# A model's scratch for a load, where one like it has told (see core/estimate.py).
Scratch = Callable[[Model, Load], int | None]


def never_calibrated(_model: Model, _load: Load) -> None:
    """Nor was the engine asked."""


class Placement(NamedTuple):
    """How much of a model lies where. `layers` counts the output layer as one."""

    context: int
    devices: tuple[str, ...] = ()  # (): the host alone
    layers: int = 0  # on the devices
    split: tuple[int, ...] = ()  # layers on each of several devices

    @property
    def where(self) -> str:
        """Most of it, for people."""
        return ",".join(self.devices) or HOST

    def with_context(self, context: int) -> Placement:
        """The same place with another context."""
        return self._replace(context=context)


@dataclass(frozen=True, slots=True)
class Choice:
    """What an earlier plan chose for a model, and from what (`basis`)."""

    port: int
    context: int
    device: str  # "CUDA0", "CUDA0,CUDA1", "CPU"
    fitted: bool  # enabled because it fitted
    basis: str
    placed: bool = False  # enabled, and there was memory for it when this was chosen
    layers: int = 0
    split: tuple[int, ...] = ()
    offered: str = ""  # the devices that there were to choose from
    rung: int = 0  # of its ladder: the one that is deployed; 0: as it was chosen
    variant: str = ""  # names what that rung says, where it is not 0
    takes: tuple[tuple[str, int], ...] = ()  # what that rung takes, by device

    @property
    def placement(self) -> Placement:
        devices = () if self.device == HOST else tuple(self.device.split(","))
        return Placement(self.context, devices, self.layers, self.split)


@dataclass(frozen=True, slots=True)
class World:
    """What a plan is made from beside the models and the settings."""

    devices: tuple[Device, ...]  # free counts what our own running models hold as free
    engine: Engine
    earlier: Mapping[str, Choice]  # by key
    port_is_free: Callable[[int], bool]
    intent: Mapping[str, bool] = field(default_factory=dict)  # enabled or disabled by command
    # What was learned or asked of the engine for these very files and arguments; beats the formula.
    known: Known = nothing_known
    scratch: Scratch = never_calibrated
    # Arguments in blocks that were edited by hand, by key: they run as they were edited.
    edited: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def offloading(self) -> tuple[Device, ...]:
        """The devices beside the host, in the engine's order."""
        return tuple(device for device in self.devices if not device.is_host)


def scaled(split: tuple[int, ...], layers: int) -> tuple[int, ...]:
    """Whole numbers that add up to `layers`, in the proportions of `split`."""
    total = max(sum(split), 1)
    ends = [layers * end // total for end in accumulate(split)]
    return tuple(end - start for start, end in zip([0, *ends], ends, strict=False))


class Configuration(NamedTuple):
    """One way to serve a model: its arguments, and what these take."""

    placement: Placement
    arguments: tuple[str, ...]
    estimate: Estimate

    def needs(self) -> dict[str, int]:
        """Bytes by device, with what must stay free beside them."""
        needs: dict[str, int] = {}
        source = self.estimate.source
        for part in self.estimate.parts:
            name, taken = part.device, part.total_bytes
            size = taken + margin_of(taken, source)
            needs[name] = needs.get(name, 0) + size
            if is_of_the_host(name):
                needs[HOST] = needs.get(HOST, 0) + size
        return needs

    def lacking(self, room: Mapping[str, int]) -> str | None:
        """A device without enough room, the host last; None: it fits."""
        return _lacking(self.needs(), room)


def _lacking(needs: Mapping[str, int], room: Mapping[str, int]) -> str | None:
    """The host is named only where every device has enough."""
    lacking = [name for name, needed in needs.items() if needed > room.get(name, 0)]
    return min(lacking, key=lambda name: name == HOST, default=None)


def is_of_the_host(device: str) -> bool:
    """Whether what lies on a device lies in the host's memory."""
    return device.startswith(_OF_THE_HOST)


def as_edited(model: Model, arguments: tuple[str, ...], world: World) -> Configuration:
    """What arguments that somebody wrote by hand take."""
    devices = tuple(device.name for device in world.offloading)
    load = load_of(arguments, trained_context=model.header.context_length, devices=devices)
    formula = estimate(
        model.header, load, projector_bytes=model.projector_bytes,
        scratch_elements=world.scratch(model, load),
    )  # fmt: skip
    found = world.known(model, arguments, formula) or formula
    return Configuration(_placement_of(load, model), arguments, found)


def _placement_of(load: Load, model: Model) -> Placement:
    most = model.header.layers + 1
    layers = most if load.gpu_layers is None else min(load.gpu_layers, most)
    on_devices = load.devices if layers else ()
    return Placement(load.context, on_devices, layers if on_devices else 0)


class Search:
    """The ways to serve one model, and the best of them that fits.

    `room` is what is left of each device, in bytes; `used`: those that others of ours lie on.
    """

    def __init__(self, candidate: Candidate, port: int, settings: Settings, world: World) -> None:
        model, said = candidate.model, candidate.said
        self.candidate = candidate
        self.contexts = candidate.contexts
        self.layers = self._wanted_layers()
        self._port, self._settings, self._world = port, settings, world
        offloading = tuple([device.name for device in world.offloading])
        self._offered = _offered(candidate, offloading)
        self._has_devices = bool(offloading)
        self._serving = Serving(
            host=settings.host, port=port, alias=candidate.alias, role=model.role,
            parallel=candidate.parallel, sleep_idle_seconds=said.sleep_idle_seconds or 0,
            extra=said.args or (),
        )  # fmt: skip
        self._profile = profile(model.header)
        self._naming = naming_words(self._serving)
        self._standing = standing_words(self._serving, world.engine)
        self._made: dict[Placement, Configuration] = {}
        # What all layers take on one device, with the smallest context, by backend.
        self._least: dict[str, int] = {}

    def _wanted_layers(self) -> int:
        """To offload, if all goes well."""
        said, every = self.candidate.said.gpu_layers, self.candidate.all_layers
        return every if said is None else min(said, every)

    def for_other(self, candidate: Candidate) -> Search:
        """The same for another model on the same port."""
        return Search(candidate, self._port, self._settings, self._world)

    @property
    def offered(self) -> str:
        """The devices that there are to choose from."""
        return ",".join(self._offered)

    def configuration(self, placement: Placement) -> Configuration:
        """One way to serve it."""
        made = self._made.get(placement)
        if made is None:
            made = self._made[placement] = self._configure(placement)
        return made

    def _configure(self, placement: Placement) -> Configuration:
        """The arguments that serve it so, and what these very arguments take."""
        model, engine, serving = self.candidate.model, self._world.engine, self._serving
        rpc = self._settings.rpc
        extent = Extent(
            placement.context, self._device(placement), self._gpu_layers(placement),
            placement.split, rpc if rpc and _RPC in placement.where else (),
        )  # fmt: skip
        placing = placing_words(extent, serving, engine)
        load = load_of(self._standing, placing, serving.extra)
        found = of_profile(
            self._profile, load, projector_bytes=model.projector_bytes,
            scratch_elements=self._world.scratch(model, load),
        )  # fmt: skip
        bound = prompt_cache_words(found.kv_bytes, serving, engine)
        words = (*self._naming, *self._standing, *placing, *bound, *serving.extra)
        return Configuration(placement, words, self._world.known(model, words, found) or found)

    def _device(self, placement: Placement) -> str | None:
        """`none` where an engine would else take all that it finds."""
        if placement.devices:
            return placement.where
        return "none" if self.candidate.said.device or self._has_devices else None

    def _gpu_layers(self, placement: Placement) -> int | None:
        """As the settings say it, where that is what is meant; then as it was chosen."""
        said = self.candidate.said.gpu_layers
        if said is not None and self.layers == placement.layers:
            return said
        return placement.layers if placement.devices or self._has_devices else said

    def can_be_kept(self, choice: Choice) -> bool:
        """Whether what was chosen from the same model and settings could be chosen again today.

        What left layers on the host, where other devices are there now, is chosen anew.
        """
        placement = choice.placement
        if placement.context not in self.contexts:
            return False
        if placement.devices and placement.layers == self.layers:
            return set(placement.devices) <= set(self._offered)
        return choice.offered == self.offered

    def best(self, room: Mapping[str, int], used: Set[str]) -> Configuration | None:
        """The best that fits; None where nothing does."""
        if not self._offered or not self.layers:
            return self._on_the_host(room)
        said = self.candidate.said
        found = self._on_one(room, used) or self._split(room)
        if found is None and said.gpu_layers is None:
            found = self._in_part(room)
            if found is None and said.device is None:
                found = self._on_the_host(room)
        return found

    def nearest(self, room: Mapping[str, int]) -> Configuration:
        """As it is meant to be, with the smallest context, whether that fits or not."""
        context = self.contexts[-1]
        if not self._offered or not self.layers:
            return self.configuration(Placement(context))
        devices = next(self._groups(room))
        return self._spread(context, devices, self.layers, room)

    def _fitting(self, found: Configuration, room: Mapping[str, int]) -> Configuration | None:
        return found if found.lacking(room) is None else None

    def _largest(self, attempt: Callable[[int], Configuration | None]) -> Configuration | None:
        """The attempt with the largest context that comes off; none where the smallest does not."""
        *larger, smallest = self.contexts
        last = attempt(smallest)
        if last is None:
            return None
        return next(filter(None, map(attempt, larger)), last)

    def _on_the_host(self, room: Mapping[str, int]) -> Configuration | None:
        return self._largest(
            lambda context: self._fitting(self.configuration(Placement(context)), room)
        )

    def _on_one(self, room: Mapping[str, int], used: Set[str]) -> Configuration | None:
        if self.candidate.said.device is not None and len(self._offered) > 1:
            return None
        in_order = sorted(
            self._offered,
            key=lambda name: (0, room.get(name, 0)) if name in used else (1, -room.get(name, 0)),
        )
        return self._largest(lambda context: self._on_first(context, in_order, room))

    def _on_first(
        self, context: int, devices: Sequence[str], room: Mapping[str, int]
    ) -> Configuration | None:
        """On the first device with room. Devices of one backend take the same: asked only once."""
        needed: dict[str, float] = {}
        for name in devices:
            backend = name.rstrip("0123456789")
            least = max(needed.get(backend, 0), self._least.get(backend, 0))
            if least > room.get(name, 0):
                continue
            found = self.configuration(Placement(context, (name,), self.layers))
            needs = found.needs()
            if context == self.contexts[-1]:
                self._least.setdefault(backend, needs.get(name, 0))
            lacking = _lacking(needs, room)
            if lacking is None:
                return found
            needed[backend] = needs[name] if lacking == name else math.inf
        return None

    def _groups(self, room: Mapping[str, int]) -> Iterator[tuple[str, ...]]:
        """Devices to be used together, fewest first, the roomiest; as named, where they are."""
        if self.candidate.said.device is not None:
            yield self._offered
            return
        roomiest = sorted(self._offered, key=lambda name: -room.get(name, 0))
        most = len(roomiest) if "--tensor-split" in self._world.engine.flags else 1
        for count in range(1, most + 1):
            yield tuple(name for name in self._offered if name in roomiest[:count])

    def _split(self, room: Mapping[str, int]) -> Configuration | None:
        for devices in self._groups(room):
            if len(devices) < 2 or self._is_too_large_for(devices, room):
                continue
            found = self._largest(partial(self._spread_if_it_fits, devices, self.layers, room))
            if found is not None:
                return found
        return None

    def _is_too_large_for(self, devices: Sequence[str], room: Mapping[str, int]) -> bool:
        """However it is split: it takes no less on several devices than on one."""
        least = min(self._least.values(), default=0)
        return least > sum(max(room.get(name, 0), 0) for name in devices)

    def _in_part(self, room: Mapping[str, int]) -> Configuration | None:
        """As many layers as fit; more devices only for more layers."""
        best: Configuration | None = None
        for devices in self._groups(room):
            found = self._most_layers(devices, room)
            if found is None or (best and found.placement.layers <= best.placement.layers):
                break
            best = found
        if best is None:
            return None
        devices, layers = best.placement.devices, best.placement.layers
        return self._largest(partial(self._spread_if_it_fits, devices, layers, room))

    def _most_layers(
        self, devices: tuple[str, ...], room: Mapping[str, int]
    ) -> Configuration | None:
        """With the smallest context. The fewer layers lie on devices, the more takes the host."""
        floor = self.contexts[-1]
        fewest, most = len(devices), self.layers - 1
        best: Configuration | None = None
        attempt = fewest  # where devices are full, not even these few fit
        while fewest <= most:
            found = self._spread(floor, devices, attempt, room)
            if found.lacking(room) in (None, HOST):
                best, fewest = found, attempt + 1
            else:
                most = attempt - 1
            attempt = (fewest + most + 1) // 2
        return best and self._fitting(best, room)

    def _spread_if_it_fits(
        self, devices: tuple[str, ...], layers: int, room: Mapping[str, int], context: int
    ) -> Configuration | None:
        return self._fitting(self._spread(context, devices, layers, room), room)

    def _spread(
        self, context: int, devices: tuple[str, ...], layers: int, room: Mapping[str, int]
    ) -> Configuration:
        """Layers over devices by their room, then moved from where they are too many."""
        if len(devices) < 2:
            return self.configuration(Placement(context, devices, layers))
        split = scaled(tuple(max(room.get(name, 0), 1) for name in devices), layers)
        found = self.configuration(Placement(context, devices, layers, split))
        for _ in range(_MOST_MENDINGS):
            moved = _moved(split, devices, found.needs(), room)
            if moved == split:
                break
            split = moved
            found = self.configuration(Placement(context, devices, layers, split))
        return found


def _moved(
    split: tuple[int, ...],
    devices: Sequence[str],
    needs: Mapping[str, int],
    room: Mapping[str, int],
) -> tuple[int, ...]:
    """Layers taken from the device that lacks most room to the one that has most left."""
    left = [room.get(name, 0) - needs.get(name, 0) for name in devices]
    poorest, richest = left.index(min(left)), left.index(max(left))
    if left[poorest] >= 0 or left[richest] <= 0 or not split[poorest]:
        return split
    layer_bytes = max(needs.get(devices[poorest], 0) // split[poorest], 1)
    count = min(-(left[poorest] // layer_bytes), max(left[richest] // layer_bytes, 1))
    moved = list(split)
    moved[poorest] -= min(count, split[poorest])
    moved[richest] += min(count, split[poorest])
    return tuple(moved)


def _offered(candidate: Candidate, offloading: tuple[str, ...]) -> tuple[str, ...]:
    """The devices that a model may be offloaded to: as the settings name them, else all."""
    said = candidate.said.device
    if said is None:
        return offloading
    names = tuple(dict.fromkeys(said.split(",")))
    return () if "none" in names else names
