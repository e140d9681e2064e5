"""Damages valid GGUF headers at random and reads them, in a process whose memory is bounded.

`python -m tests.unit.fuzz_headers FOLDER COUNT SEED` reads each file in FOLDER as it is, then COUNT
damaged headers made from those that are valid, and prints what happened as JSON. Every case can be
repeated: it depends on the seed, its number and the folder's content alone.

Only the reader under test and the standard library are loaded, so that the memory measured is the
reader's.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from supervisor_synapse.adapters import gguf_header
from supervisor_synapse.core.model import Header
from supervisor_synapse.errors import CatalogError

ADDRESS_SPACE_BYTES = 256 * 1024 * 1024
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_PARTICULARS = re.compile(r"""'.*'(\.\.\.)?|".*"(\.\.\.)?|\d+""")  # what a reason quotes
_INTERESTING = (
    0, 1, 2, 3, 7, 8, 9, 13, 31, 32, 63, 64, 255, 256, 1024, 4096, 2**15, 2**16 - 1, 2**16, 2**24,
    2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**48, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sample:
    """A valid header and where its fields are: (offset, size) by what they are."""

    name: str
    header: bytes
    file_bytes: int
    fields: dict[str, list[tuple[int, int]]]


class _Map:
    """Walks a valid header and notes where counts, lengths, types, texts and values stand."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self.fields: dict[str, list[tuple[int, int]]] = {
            kind: [] for kind in ("count", "length", "type", "value", "text")
        }
        self._note("value", 8)
        tensors, keys = self._number("count", 8), self._number("count", 8)
        for _ in range(keys):
            self._text()
            self._value(self._number("type", 4))
        for _ in range(tensors):
            self._text()
            dimensions = self._number("count", 4)
            for _ in range(dimensions):
                self._note("value", 8)
            self._note("type", 4)
            self._note("value", 8)
        self.end = self._at

    def _note(self, kind: str, size: int) -> None:
        self.fields[kind].append((self._at, size))
        self._at += size

    def _number(self, kind: str, size: int) -> int:
        self._note(kind, size)
        return int.from_bytes(self._data[self._at - size : self._at], "little")

    def _text(self) -> None:
        self._note("text", self._number("length", 8))

    def _value(self, kind: int) -> None:
        if kind == _STRING:
            self._text()
        elif kind == _ARRAY:
            element, count = self._number("type", 4), self._number("count", 8)
            for _ in range(count):
                self._value(element)
        else:
            self._note("value", _SIZES[kind])


def _sample(path: Path) -> Sample:
    data = path.read_bytes()
    found = _Map(data)
    return Sample(path.name, data[: found.end + 64], len(data), found.fields)


# --- damage --------------------------------------------------------------------------------------


def _flip(data: bytearray, sample: Sample, chance: random.Random) -> None:
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _overwrite(data: bytearray, sample: Sample, chance: random.Random) -> None:
    """A count, length or value becomes an interesting number, or moves by a little."""
    at, size = chance.choice(sample.fields[chance.choice(("count", "length", "value"))])
    old = int.from_bytes(data[at : at + size], "little")
    new = chance.choice((chance.choice(_INTERESTING), old + chance.randint(-9, 9), old * 2))
    data[at : at + size] = (new % 256**size).to_bytes(size, "little")


def _retype(data: bytearray, sample: Sample, chance: random.Random) -> None:
    at, size = chance.choice(sample.fields["type"])
    new = chance.choice((*range(45), 2**31, 2**32 - 1))
    data[at : at + size] = new.to_bytes(size, "little")


def _retext(data: bytearray, sample: Sample, chance: random.Random) -> None:
    """Random bytes, or another text of the same file, over a key, a name or a string."""
    at, size = chance.choice(sample.fields["text"])
    other, length = chance.choice(sample.fields["text"])
    new = chance.choice((chance.randbytes(size), bytes(data[other : other + length])[:size]))
    data[at : at + len(new)] = new


def _cut(data: bytearray, sample: Sample, chance: random.Random) -> None:
    begin = chance.randrange(len(data))
    del data[begin : begin + chance.choice((1, 4, 8, chance.randint(1, 200)))]


def _insert(data: bytearray, sample: Sample, chance: random.Random) -> None:
    begin = chance.randrange(len(data))
    source = chance.randrange(len(data))
    length = chance.choice((1, 4, 8, chance.randint(1, 200)))
    data[begin:begin] = chance.choice((data[source : source + length], chance.randbytes(length)))


def _truncate(data: bytearray, sample: Sample, chance: random.Random) -> None:
    del data[chance.randrange(len(data)) :]


_DAMAGES: tuple[Callable[[bytearray, Sample, random.Random], None], ...] = (
    _flip, _overwrite, _overwrite, _retype, _retext, _cut, _insert, _truncate,
)  # fmt: skip


def _damaged(samples: list[Sample], chance: random.Random) -> tuple[bytes, int]:
    """A header, and the size of the file that it claims to be of."""
    sample = chance.choice(samples)
    data = bytearray(sample.header)
    if chance.random() < 0.1:  # the head of one with the tail of another
        tail = chance.choice(samples).header
        data[chance.randrange(len(data)) :] = tail[chance.randrange(len(tail)) :]
    for _ in range(chance.choice((1, 1, 1, 2, 3, 5))):
        fits = [damage for damage in _DAMAGES if len(data) >= len(sample.header) or damage is _flip]
        if data:
            chance.choice(fits)(data, sample, chance)
    size = chance.choice((sample.file_bytes, sample.file_bytes, len(data), 2**40))
    return bytes(data), max(size, len(data))


# --- reading -------------------------------------------------------------------------------------


class _Tally:
    """What came of the cases."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.strangers: list[str] = []
        self.slowest: tuple[float, str] = (0.0, "")

    def count(self, case: str, read: Callable[[], Header]) -> None:
        begun = time.thread_time()
        try:
            outcome = self._outcome(read)
        except Exception:
            outcome = "stranger"
            self.strangers.append(f"{case}: {traceback.format_exc()}")
        self.outcomes[outcome] += 1
        self.slowest = max(self.slowest, (time.thread_time() - begun, case))

    def _outcome(self, read: Callable[[], Header]) -> str:
        try:
            header = read()
        except CatalogError as error:
            text = str(error)
            if not (text.isascii() and text.isprintable() and 0 < len(text) < 400):
                raise ValueError(f"not fit to show: {text!r}") from None
            self.reasons[_PARTICULARS.sub("#", text)] += 1
            return "rejected"
        _check(header)
        return "accepted"


def _check(header: Header) -> None:
    """What holds of every header that is accepted, whatever its bytes were."""
    for field in dataclasses.fields(header):
        value = getattr(header, field.name)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, str) and not part.isprintable():
                raise ValueError(f"{field.name} is not fit to show: {part!r}")
            if isinstance(part, int) and part < 0:
                raise ValueError(f"{field.name} is negative: {part}")
    if len(header.block_bytes) > 1024 or header.tensors > 65_536:
        raise ValueError("larger than any limit")


def _peak_bytes() -> int:
    """Of this program alone: on Linux ru_maxrss also knows the process that was forked."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main(folder: Path, cases: int, seed: int) -> None:
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    tally = _Tally()
    samples = []
    for path in sorted(folder.iterdir()):
        tally.count(path.name, lambda path=path: gguf_header.read(path))  # type: ignore[misc]
        if path.suffix == ".gguf":
            samples.append(_sample(path))
    for number in range(cases):
        data, size = _damaged(samples, random.Random(f"{seed}:{number}"))
        tally.count(f"case {number}", lambda: gguf_header.parse(data, size))  # noqa: B023
    json.dump(
        {
            "outcomes": tally.outcomes,
            "reasons": tally.reasons,
            "strangers": tally.strangers[:5],
            "slowest": tally.slowest,
            "peak_bytes": _peak_bytes(),
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
