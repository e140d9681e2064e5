"""Why a server ended: exit status and log tail → class and evidence.

llama-server exits with 1 for nearly everything; what happened stands in its log. The launcher's
own refusals have exit statuses of their own. The texts are those of llama.cpp's builds of 2025
and 2026.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from supervisor_synapse.core.model import FailureClass

# A retry cannot help.
PERMANENT = frozenset(
    {FailureClass.BAD_ARGUMENT, FailureClass.MODEL_MISSING, FailureClass.MODEL_CORRUPT}
)
# These keep a server from becoming ready. What looks like one in the log of a server that was ready
# stems from some request.
_AT_START_ONLY = PERMANENT | {FailureClass.PORT_IN_USE}

# First match wins: what is most telling comes first. A message of a failed load follows each of
# these in the log and says less.
_TEXTS: tuple[tuple[FailureClass, str], ...] = (
    # A device of another process or machine is away; it may come back.
    (FailureClass.CRASHED, r"Remote RPC server crashed|Failed to connect to \S+:\d+"),
    (FailureClass.PORT_IN_USE, r"couldn't bind HTTP server socket"),
    (FailureClass.BAD_ARGUMENT, r"error: invalid argument|error while handling argument"
                                r"|chat template is not supported"),
    (FailureClass.MODEL_MISSING, r"failed to open GGUF file .*No such file"),
    (FailureClass.OUT_OF_MEMORY, r"insufficient memory|failed to allocate|ErrorOutOfDeviceMemory"
                                 r"|out of memory"),
    (FailureClass.MODEL_CORRUPT, r"failed to read magic|invalid magic characters"
                                 r"|failed to read key-value pairs|number of tensors is"
                                 r"|exceeds maximum|only supports up to version"
                                 r"|not within the file bounds"),
)  # fmt: skip
_PATTERNS = tuple((kind, re.compile(text, re.IGNORECASE)) for kind, text in _TEXTS)

REFUSED_STATUS = 69  # of the launcher: by the ledger there is no memory; nothing was started

# The launcher's own exit statuses, see launcher.py.
_STATUSES = {
    64: FailureClass.BAD_ARGUMENT,
    66: FailureClass.MODEL_MISSING,
    REFUSED_STATUS: FailureClass.OUT_OF_MEMORY,
    72: FailureClass.BAD_ARGUMENT,
    75: FailureClass.PORT_IN_USE,
}

_LONGEST_EVIDENCE = 300

# The launcher says this when it starts (launcher.py); what stands before is of an earlier run.
_OUR_WORDS = "synapse-run: "
_START_MARK = "synapse-run: start: pid="
_PLAIN_END = "synapse-run: ended by itself: server=exit "  # says less than the line before it
_ABORTED = 128 + 6

_GENERIC = re.compile(r"exiting due to|cleaning up before exit|failed to load model", re.IGNORECASE)
_ERROR = re.compile(r"error|exception|failed|unable|cannot", re.IGNORECASE)
_ASSERTION = "GGML_ASSERT"


@dataclass(frozen=True, slots=True)
class Ending:
    """How a process ended: its exit status, and the last of what it printed.

    `damage`: what is wrong with the model's files, where the server said nothing.
    """

    exit_status: int
    log_tail: str
    damage: str = ""

    @property
    def is_wordless(self) -> bool:
        """Whether the server itself printed nothing: llama-server writes its log from a thread,
        and may end before that has come to it.
        """
        lines = _lines_of_last_run(self.log_tail)
        return all(line.startswith(_OUR_WORDS) for line in lines)


def classify(ending: Ending, *, was_ready: bool = False) -> tuple[FailureClass, str]:
    """The class, and the line that shows it (printable, at most 300 characters).

    A server that aborts without a word while it loads has found no memory.
    """
    lines = _lines_of_last_run(ending.log_tail)
    last = _most_telling(lines) or _describe(ending.exit_status)
    refusal = _STATUSES.get(ending.exit_status)
    if refusal is not None and not was_ready:
        return refusal, last  # before a server ran; a file's name in the line proves nothing
    if ending.damage and not was_ready:
        return FailureClass.MODEL_CORRUPT, printable(ending.damage)
    for kind, pattern in _PATTERNS:
        if was_ready and kind in _AT_START_ONLY:
            continue
        for line in reversed(lines):
            if pattern.search(line):
                return kind, printable(line)
    if ending.exit_status == _ABORTED and not was_ready:
        for line in reversed(lines):
            if _ASSERTION in line:
                return FailureClass.CRASHED, printable(line)
        return FailureClass.OUT_OF_MEMORY, last
    return FailureClass.CRASHED, last


def _most_telling(lines: list[str]) -> str:
    """The last line, or the last error before it where it only says that all is over."""
    telling = [line for line in lines if not line.startswith(_PLAIN_END)]
    if not telling:
        return ""
    if _GENERIC.search(telling[-1]):
        errors = [line for line in telling if _ERROR.search(line) and not _GENERIC.search(line)]
        return printable(errors[-1] if errors else telling[-1])
    return printable(telling[-1])


def _lines_of_last_run(log_tail: str) -> list[str]:
    lines = [line for line in log_tail.splitlines() if line.strip()]
    starts = [number for number, line in enumerate(lines) if line.startswith(_START_MARK)]
    return lines[starts[-1] + 1 :] if starts else lines


def _describe(status: int) -> str:
    """An exit status in words; supervisord reports a death by signal as -1."""
    if status < 0:
        return "killed by a signal"
    if 128 < status < 160:
        return f"killed by signal {status - 128}"
    return f"exit status {status}"


def printable(text: str) -> str:
    """Text from outside as one line fit for a terminal, a log or a page."""
    cleaned = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(cleaned.split())[:_LONGEST_EVIDENCE]
