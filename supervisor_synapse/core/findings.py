"""What an examination of a deployment found: frozen values, and text that is safe to show."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum

_LONGEST = 1000


class Severity(IntEnum):
    """How bad it is; only errors make the examination fail."""

    OK = 0
    NOTE = 1  # worth knowing; nothing need be done
    WARNING = 2  # works, and should be mended
    ERROR = 3  # does not work, or is not safe


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found. `id` is stable; `lines` are to be copied into a file."""

    severity: Severity
    id: str
    subject: str  # what it is about: a path, a model, a device
    message: str
    mend: str = ""
    lines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Examined:
    """What one check found."""

    check: str
    findings: tuple[Finding, ...]

    @property
    def severity(self) -> Severity:
        return max((one.severity for one in self.findings), default=Severity.OK)


@dataclass(frozen=True, slots=True)
class Examination:
    """All that was found, and the versions of what was looked at."""

    checks: tuple[Examined, ...]
    versions: tuple[tuple[str, str], ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Each once, the worst first; else in the order of the checks."""
        return tuple(one for _, one in self.attributed)

    @property
    def attributed(self) -> tuple[tuple[str, Finding], ...]:
        """The same with the check that found each; what two found stands there once."""
        by: dict[Finding, str] = {}
        for check in self.checks:
            for one in check.findings:
                by.setdefault(one, check.check)
        found = [(check, one) for one, check in by.items()]
        return tuple(sorted(found, key=lambda pair: -pair[1].severity))

    @property
    def is_well(self) -> bool:
        return all(check.severity < Severity.ERROR for check in self.checks)


def fine(subject: str, message: str) -> Finding:
    """Nothing is wrong, and what was seen."""
    return Finding(Severity.OK, "ok", subject, message)


def note(name: str, subject: str, message: str, mend: str = "") -> Finding:
    return Finding(Severity.NOTE, name, subject, message, mend)


def warning(name: str, subject: str, message: str, mend: str = "") -> Finding:
    return Finding(Severity.WARNING, name, subject, message, mend)


def error(
    name: str, subject: str, message: str, mend: str = "", lines: Iterable[str] = ()
) -> Finding:
    return Finding(Severity.ERROR, name, subject, message, mend, tuple(lines))


def shown(finding: Finding) -> Finding:
    """The same in printable ASCII, each part on one line and not without end."""
    return replace(
        finding,
        subject=_plain(finding.subject), message=_plain(finding.message),
        mend=_plain(finding.mend), lines=tuple(map(_plain, finding.lines)),
    )  # fmt: skip


def _plain(text: str) -> str:
    """What is escaped already stays as it is."""
    text = "".join(c if " " <= c <= "~" else ascii(c)[1:-1] for c in text[: 2 * _LONGEST])
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
