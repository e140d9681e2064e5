"""What llama-server says of its memory, at `--log-verbosity 4` and above: log text → bytes.

Two things tell: the lines of a real load, one for each buffer that was made, to 0.01 MiB; and the
table of a dry fit (`-fit on`), made before anything is loaded, in whole MiB.

- A log may hold several runs, each begun by the launcher's line, and a run several loads: one that
  slept loads again when it wakes. The last load counts.
- Each cache of a model prints its lines, so they add up. A context that is laid out anew prints its
  scratch again: the larger one counts.
- `offloaded 13/13 layers to GPU` is also said where there is no device at all. Only a buffer on a
  device shows that something came onto it.
- RPC buffers are named by the server's own numbering: `RPC0[a:1]` and `RPC0[b:2]` are two devices,
  which the list of devices calls RPC0 and RPC1.
- `CPU_Mapped` is the part of the file that stays mapped, from the first to the last tensor that
  the host needs. What lies between belongs to devices, or was copied into `CPU_REPACK`: it is
  resident, but never read again, and the kernel drops it at will. The tensors alone are counted
  where the same load's dry fit tells them, else the whole span: never less than is needed.

Text from outside is bounded, lines are matched from their beginning, and no pattern backtracks. The
engine prints a model's name as it stands, with its line feeds: a hostile model can forge lines. All
that it can change is its own figures; what a header proves (weights, cache) is the better witness.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from supervisor_synapse.core.failures import printable
from supervisor_synapse.core.model import Part
from supervisor_synapse.core.settings import MIB

_HOST = "CPU"
_LARGEST_TEXT = 4 * 1024 * 1024  # characters of one run that are looked at
_LONGEST_LINE = 1000
_MOST_DEVICES = 64

_RUN_START = "synapse-run: start: pid="  # launcher.py
_ESCAPE = re.compile(r"\x1b\[[0-9;]{0,16}m")  # colours

# `0.00.022.057 I srv    load_model: message`, and without time and level from older builds.
_LINE = re.compile(
    r"(?:[0-9][0-9.]{0,30} [A-Z] )?(?:[a-z]{1,5} +)?([~A-Za-z_][\w()]{0,60}): +(\S.*)", re.ASCII
)
_NUMBER = r"([0-9]{1,9}(?:\.[0-9]{1,6})?)"
_BUFFER = re.compile(
    rf"([!-~]{{1,200}}) +(?:(model|LoRA|KV|RS|compute|output) +)?buffer size *= *{_NUMBER} *MiB",
    re.ASCII,
)
_OFFLOADED = re.compile(r"offloaded ([0-9]{1,6})/([0-9]{1,6}) layers")
_NO_DEVICE = "no usable GPU found"

_LOAD_START = "loading model '"
_LOAD_END = re.compile(r"initializing(?: slots)?, n_slots|(?:init: )?chat template")
_MODEL_START = "loading model tensors"
_CONTEXT_START = "constructing llama_context"
_FIT_START = "fitting params to device memory"
_FIT_END = "fitting params to free memory took"
_FIT_FAILED = "encountered an error while trying to fit"
_FIT_PROJECTED = "projected "
_FIT_LEAVES_IT = "no changes needed"
_NO_ALLOC = "no_alloc "

_TABLE_FUNCTION = "memory_breakdown_print"
_TABLE_HEAD = "| memory breakdown"
_ROW_NAME = re.compile(r"\| +- ([!-~]{1,200})")
_ROW_FIGURES = re.compile(
    r"([0-9]{1,9}) = +([0-9]{1,9}) \+ +([0-9]{1,9}) \+ +([0-9]{1,9})(?![0-9])"
)
_MTP_CONTEXT = "[spec] estimated memory usage of MTP context"
_PROJECTOR = re.compile(rf"\[mtmd\] estimated worst-case memory usage of mmproj is {_NUMBER} MiB")
_PROJECTOR_ON = re.compile(
    rf"\[mtmd\] adding {_NUMBER} MiB to fit_params_target for device ([!-~]{{1,200}})"
)
_CLIP_ON = re.compile(r"CLIP using ([!-~]{1,200}) backend")
_CLIP_SIZE = re.compile(rf"model size: +{_NUMBER} MiB")

_RPC_BUFFER = re.compile(r"RPC([0-9]{0,4})\[(.{1,150})\]")
_RPC_DEVICE = re.compile(r"(?:- |using device )(RPC[0-9]{1,4}) *(?:: |\()([^\s()]{1,150})")
_SHARED_BUFFER = re.compile(r"Meta\(|\w*_Split$", re.ASCII)  # one figure for several devices


@dataclass(frozen=True, slots=True)
class Loaded:
    """What one load took, or would take, device by device (each once, the host last).

    Devices have the engine's names; whatever lies on the host stands under CPU. Overheads are not
    part of it. From a dry fit, the state of recurrent layers is counted with the cache.
    """

    parts: tuple[Part, ...]
    offloaded: int | None  # layers of the main model that lie on devices; None: not said
    layers: int | None  # of so many, the output layer included

    def on(self, device: str) -> int:
        """Bytes on one device."""
        return sum(part.total_bytes for part in self.parts if part.device == device)


def parse_load(text: str) -> Loaded | None:
    """The last load that the text tells of; None where it does not tell all of it.

    It does not where the load is under way, was told at a lower verbosity, or shares one buffer
    between devices (`--split-mode row` and `tensor`). Draft, adapters and projector are included.
    """
    lines = _last_load(text)
    found = _buffers(lines)
    if not found.is_complete or any(_SHARED_BUFFER.match(one.name) for one in found.buffers):
        return None
    names = _rpc_names(_lines_of_last_run(text))
    sizes = _Sizes()
    for buffer in _summed(found.buffers):
        sizes.add(_device(buffer.name, names), buffer.field, buffer.size_bytes)
    sizes.lower_host_weights(_needed_host_weights(lines, found))
    for name, size_bytes in found.projector:
        sizes.add(_device(name, names), "weights_bytes", size_bytes)
    return Loaded(sizes.parts(), found.offloaded, found.layers)


def parse_dry_run(text: str) -> Loaded | None:
    """What the last load in the text would take with its arguments as given; None: not told.

    The engine rounds to whole MiB, down; here each device's sum is rounded up, in its weights. With
    `--log-verbosity 5` the scratch is exact, the buffer for what comes out is included, and the
    projector's device is known.
    """
    lines = _last_load(text)
    fit = _fit(lines)
    if fit is None or fit.initial is None:
        return None
    sizes = _Sizes()
    names = _rpc_names(_lines_of_last_run(text))
    for table in (*fit.before, fit.initial):
        _add_table(sizes, table, names)
    for name, size_bytes in fit.projector or _unplaced_projector(fit):
        sizes.add(_host_or(name), "weights_bytes", size_bytes)
    return Loaded(sizes.parts(), fit.offloaded, fit.layers)


def ends_dry_run(line: str) -> bool:
    """Whether a line comes after all that `parse_dry_run` needs, and before any weight is read."""
    found = _split(line)
    return found is not None and found.message.startswith((_FIT_END, _FIT_PROJECTED))


def is_on_host(text: str) -> str:
    """The line that shows that the last load put no layer onto any device; "": nothing shows it.

    For a model that was asked onto a device: without one, the same lines are as they should be.
    A draft or a projector on a device does not count.
    """
    lines = _last_load(text)
    found = _buffers(lines)
    main = [one for one in found.buffers if one.model <= 1 and one.field in _PLACED]
    if any(not _is_host(buffer.name) for buffer in main):
        return ""
    for line in lines:
        if _NO_DEVICE in line.message:
            return _quoted(line)
    if not found.is_complete:
        return ""
    for line in lines:
        if line.message.startswith("offloaded 0/"):
            return _quoted(line)
    return main[0].line if main else ""


# --- lines ----------------------------------------------------------------------------------------


class _Line(NamedTuple):
    function: str
    message: str


def _lines_of_last_run(text: str) -> list[_Line]:
    start = text.rfind("\n" + _RUN_START)
    run = text[start + 1 : start + 1 + _LARGEST_TEXT]
    if "\x1b" in run:
        run = _ESCAPE.sub("", run)
    # Nothing but a line feed ends a line: names may contain what `splitlines` would split at.
    found = (_split(line[:_LONGEST_LINE].rstrip("\r")) for line in run.split("\n"))
    return [line for line in found if line is not None]


def _split(line: str) -> _Line | None:
    found = _LINE.match(line)
    return _Line(found[1], found[2]) if found else None


def _last_load(text: str) -> list[_Line]:
    """The lines of the last load of the last run, up to where it has all its memory."""
    lines = _lines_of_last_run(text)
    starts = [
        number
        for number, line in enumerate(lines)
        if line.function in ("load_model", "main") and line.message.startswith(_LOAD_START)
    ]
    lines = lines[starts[-1] :] if starts else lines
    for number, line in enumerate(lines):
        if _LOAD_END.match(line.message):
            return lines[:number]
    return lines


def _quoted(line: _Line) -> str:
    return printable(f"{line.function}: {line.message}")


def _bytes(mebibytes: str) -> int:
    return round(float(mebibytes) * MIB)


# --- a real load ----------------------------------------------------------------------------------

_FIELDS = {
    None: "weights_bytes", "model": "weights_bytes", "LoRA": "weights_bytes", "KV": "kv_bytes",
    "RS": "recurrent_bytes", "compute": "compute_bytes", "output": "compute_bytes",
}  # fmt: skip
_PLACED = frozenset({"weights_bytes", "kv_bytes", "recurrent_bytes"})  # what a layer consists of


class _Buffer(NamedTuple):
    model: int  # which of the load's models, from 1; 0: before any
    context: int
    function: str
    name: str  # as printed
    kind: str
    field: str
    size_bytes: int
    line: str


@dataclass(slots=True)
class _Buffers:
    buffers: list[_Buffer] = field(default_factory=list)
    projector: list[tuple[str, int]] = field(default_factory=list)
    models: int = 0
    said: tuple[int, int] | None = None  # layers offloaded, of so many, for the main model

    @property
    def is_complete(self) -> bool:
        """The scratch is laid out last."""
        kinds = {buffer.kind for buffer in self.buffers}
        return {"model", "compute"} <= kinds or {"", "compute"} <= kinds

    @property
    def offloaded(self) -> int | None:
        """None onto devices where no buffer is on one, whatever the engine says."""
        if self.said is None:
            return None
        main = [one for one in self.buffers if one.model <= 1 and one.field in _PLACED]
        return self.said[0] if any(not _is_host(one.name) for one in main) else 0

    @property
    def layers(self) -> int | None:
        return self.said[1] if self.said else None


def _buffers(lines: Iterable[_Line]) -> _Buffers:
    found = _Buffers()
    context, clip = 0, _HOST
    for line in _without_dry_loads(lines):
        if line.message.startswith(_MODEL_START):
            found.models += 1
        elif line.message.startswith(_CONTEXT_START):
            context += 1
        elif (layers := _OFFLOADED.match(line.message)) and found.said is None:
            found.said = (int(layers[1]), int(layers[2]))
        elif backend := _CLIP_ON.match(line.message):
            clip = backend[1]
        elif line.function == "load_hparams" and (size := _CLIP_SIZE.match(line.message)):
            found.projector.append((clip, _bytes(size[1])))
        elif buffer := _BUFFER.match(line.message):
            found.buffers.append(_as_buffer(line, buffer, found.models, context))
    return found


def _as_buffer(line: _Line, found: re.Match[str], model: int, context: int) -> _Buffer:
    kind = found[2]
    return _Buffer(
        model, context, line.function, found[1], kind or "", _FIELDS[kind], _bytes(found[3]),
        _quoted(line),
    )  # fmt: skip


def _without_dry_loads(lines: Iterable[_Line]) -> Iterator[_Line]:
    """At verbosity 5 a dry load prints the lines of a real one."""
    is_dry = False
    for line in lines:
        if line.message.startswith(_FIT_START):
            is_dry = True
        elif line.message.startswith(_FIT_END):
            is_dry = False
        elif line.function == "print_info" and line.message.startswith(_NO_ALLOC):
            is_dry = line.message.endswith("= 1")
        elif not is_dry:
            yield line


def _summed(buffers: Iterable[_Buffer]) -> Iterator[_Buffer]:
    """Each once; of what one context laid out several times, the largest."""
    laid_out: dict[tuple[int, int, str, str, str], _Buffer] = {}
    for buffer in buffers:
        if buffer.field != "compute_bytes":
            yield buffer
            continue
        key = (buffer.model, buffer.context, buffer.function, buffer.name, buffer.kind)
        before = laid_out.get(key)
        if before is None or before.size_bytes < buffer.size_bytes:
            laid_out[key] = buffer
    yield from laid_out.values()


def _needed_host_weights(lines: Sequence[_Line], found: _Buffers) -> int | None:
    """At most so much of the weights on the host is ever read again; None: not told.

    The dry fit of the same load tells the tensors' sizes, if it then left everything as it was.
    """
    fit = _fit(lines)
    if fit is None or fit.initial is None or not fit.leaves_it:
        return None
    tables = (*fit.before, fit.initial)
    if len(tables) != found.models:
        return None
    rows = [row for table in tables for name, row in table.rows.items() if _is_host(name)]
    return sum(row.model + 1 for row in rows) * MIB  # each was rounded down


# --- the table of a dry fit -----------------------------------------------------------------------


class _Row(NamedTuple):
    """Whole MiB, each rounded down by itself."""

    total: int
    model: int
    context: int
    compute: int


@dataclass(slots=True)
class _Table:
    rows: dict[str, _Row] = field(default_factory=dict)
    buffers: list[_Buffer] = field(default_factory=list)  # at verbosity 5: scratch and output


@dataclass(slots=True)
class _Fit:
    before: list[_Table] = field(default_factory=list)  # of drafts
    initial: _Table | None = None  # with the arguments as given
    has_begun: bool = False
    is_over: bool = False  # the first table is whole
    leaves_it: bool = False
    projector: list[tuple[str, int]] = field(default_factory=list)
    unplaced_bytes: int = 0  # of the projector
    offloaded: int | None = None
    layers: int | None = None


def _fit(lines: Iterable[_Line]) -> _Fit | None:
    """The dry fit of a load; None where it failed, or its first table is not all there."""
    fit = _Fit()
    table: _Table | None = None
    waiting: list[_Buffer] = []
    for line in lines:
        message = line.message
        if line.function.endswith(_TABLE_FUNCTION):
            if message.startswith(_TABLE_HEAD):
                table, waiting = _Table(buffers=waiting), []
                _keep(fit, table)
            elif table is not None:
                _read_row(table, message)
        elif _FIT_FAILED in message:
            return None
        elif message.startswith(_FIT_START):
            fit.has_begun = True
        elif message.startswith(_FIT_END):
            fit.is_over = fit.has_begun
            break
        elif buffer := _BUFFER.match(message):
            waiting.append(_as_buffer(line, buffer, 0, 0))
        else:
            _read_remark(fit, table, line)
    return fit if fit.is_over and fit.initial is not None and fit.initial.rows else None


def _keep(fit: _Fit, table: _Table) -> None:
    """A fit that changes something prints a table for each try; the first is of what was asked."""
    if not fit.has_begun:
        fit.before.append(table)
    elif fit.initial is None:
        fit.initial = table


def _read_row(table: _Table, message: str) -> None:
    """`|   - RPC0 (127.0.0.1:1) | 24105 = 24105 + ( 222 = 139 + 64 + 19) + -222 |`, or, on the
    host, `|   - Host | 25 = 19 + 0 + 6 |`. A description may contain anything.
    """
    name = _ROW_NAME.match(message)
    _, _, figures = message.rstrip(" |").rpartition("|")
    found = _ROW_FIGURES.search(figures)
    if name and found and len(table.rows) < _MOST_DEVICES:
        table.rows[name[1]] = _Row(*map(int, found.groups()))


def _read_remark(fit: _Fit, table: _Table | None, line: _Line) -> None:
    message = line.message
    if line.function.endswith("fit_impl"):
        fit.is_over = fit.is_over or message.startswith(_FIT_PROJECTED)
        fit.leaves_it = fit.leaves_it or _FIT_LEAVES_IT in message
    elif message.startswith(_MTP_CONTEXT) and table is not None:
        # It drafts with weights of the main model, which are in that model's table as well.
        for name, row in table.rows.items():
            table.rows[name] = row._replace(total=row.total - row.model, model=0)
    elif placed := _PROJECTOR_ON.match(message):
        fit.projector.append((placed[2], _bytes(placed[1])))
    elif size := _PROJECTOR.match(message):
        fit.unplaced_bytes = _bytes(size[1])
    elif fit.has_begun and fit.layers is None and (layers := _OFFLOADED.match(message)):
        fit.offloaded, fit.layers = int(layers[1]), int(layers[2])


def _unplaced_projector(fit: _Fit) -> list[tuple[str, int]]:
    """The engine puts it onto its first device; that need not be one of the model's."""
    rows = fit.initial.rows if fit.initial else {}
    devices = [name for name in rows if not _is_host(name)]
    return [(devices[0] if devices else _HOST, fit.unplaced_bytes)] if fit.unplaced_bytes else []


def _add_table(sizes: _Sizes, table: _Table, names: Mapping[str, Sequence[str]]) -> None:
    exact: dict[str, int] = {}
    for buffer in _summed(table.buffers):
        if buffer.kind == "compute":
            device = _device(buffer.name, names)
            exact[device] = exact.get(device, 0) + buffer.size_bytes
        elif buffer.kind == "output":  # the table leaves it out
            sizes.add(_device(buffer.name, names), "compute_bytes", buffer.size_bytes)
    for name, row in table.rows.items():
        device = _host_or(name)
        if not row.total and device != _HOST:
            continue  # nothing lies there
        kv_bytes, compute_bytes = row.context * MIB, exact.pop(device, row.compute * MIB)
        rest_bytes = (row.total + 1) * MIB - kv_bytes - compute_bytes
        sizes.add(device, "weights_bytes", max(rest_bytes, row.model * MIB))
        sizes.add(device, "kv_bytes", kv_bytes)
        sizes.add(device, "compute_bytes", compute_bytes)


# --- devices --------------------------------------------------------------------------------------


def _is_host(name: str) -> bool:
    return name.startswith((_HOST, "Host", "AMX")) or name.endswith("_Host")


def _host_or(name: str) -> str:
    return _HOST if _is_host(name) else name


def _device(buffer: str, rpc_names: Mapping[str, Sequence[str]]) -> str:
    """The device in which a buffer lies: `CUDA0`, `MTL0_Mapped`, `RPC0[127.0.0.1:50071]` …"""
    if _is_host(buffer):
        return _HOST
    remote = _RPC_BUFFER.match(buffer)
    if remote is None:
        return buffer.partition("_")[0]
    number, names = int(remote[1] or 0), rpc_names.get(remote[2], ())
    return names[number] if number < len(names) else buffer


def _rpc_names(lines: Iterable[_Line]) -> dict[str, list[str]]:
    """The engine's names for the devices of each RPC server, in that server's order."""
    names: dict[str, list[str]] = {}
    for line in lines:
        found = _RPC_DEVICE.match(line.message.removeprefix("| ").lstrip())
        if found:
            known = names.setdefault(found[2], [])
            if found[1] not in known and len(known) < _MOST_DEVICES:
                known.append(found[1])
    return names


class _Sizes:
    """Bytes by device and field of `Part`; one for each call."""

    def __init__(self) -> None:
        self._devices: dict[str, Counter[str]] = {}

    def add(self, device: str, name: str, size_bytes: int) -> None:
        self._devices.setdefault(device, Counter())[name] += size_bytes

    def lower_host_weights(self, most_bytes: int | None) -> None:
        host = self._devices.get(_HOST)
        if host is not None and most_bytes is not None:
            host["weights_bytes"] = min(host["weights_bytes"], most_bytes)

    def parts(self) -> tuple[Part, ...]:
        ordered = sorted(self._devices, key=lambda device: device == _HOST)
        parts = (Part(device, **self._devices[device]) for device in ordered)
        return tuple(part for part in parts if part.total_bytes)
