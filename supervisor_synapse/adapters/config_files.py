"""supervisord's configuration files, read by supervisord's own parser.

Imported inside supervisord itself: nothing heavy is imported here, and nothing of a caller's
process is changed.
"""

from __future__ import annotations

import configparser
import fnmatch
import glob
import io
import locale
import os
import re
import shlex
import stat
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from supervisor_synapse.errors import ConfigError


class _Named(io.StringIO):
    """Text that supervisord's parser takes for the file `name`."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text, newline=None)
        self.name = name


class Expected(Protocol):
    """What a rendered block must be when supervisord has parsed it."""

    @property
    def name(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def command(self) -> tuple[str, ...]: ...
    @property
    def environment(self) -> Mapping[str, str]: ...
    @property
    def log_file(self) -> str: ...


def check_block(block: Expected, keys: frozenset[str]) -> None:
    """Refuse a block that is not exactly one program with exactly `keys`.

    Raises:
        ConfigError: says what is wrong with it.
    """
    from supervisor.options import UnhosedConfigParser

    parser = UnhosedConfigParser()
    try:
        # As from a file: there a bare carriage return ends a line too.
        parser.read_file(io.StringIO(block.text, newline=None))
    except configparser.Error as error:
        raise ConfigError(f"the block of {block.name} does not parse: {error}") from None
    sections = parser.sections()
    if sections != [f"program:{block.name}"] or parser.defaults():
        raise ConfigError(
            f"the block of {block.name} has the sections {sections!a}, where only "
            f"[program:{block.name}] may stand"
        )
    found = frozenset(parser.options(sections[0]))
    if found != keys:
        odd = ", ".join(sorted(found ^ keys))
        raise ConfigError(f"the block of {block.name} lacks, or must not have: {odd}")


def parse_back(main: Path, candidates: Path, blocks: Sequence[Expected]) -> None:
    """Have supervisord's own parser read the main file with `candidates` for its conf.d.

    Raises:
        ConfigError: the configuration does not parse, or a block came back as something else.
    """
    from supervisor.options import ServerOptions

    options = ServerOptions()
    options.configfile = str(main)
    options.here = str(main.parent)
    try:
        _require_text(main, candidates)
        root = options.read_config(_Named(_with_candidates(main, candidates), str(main)))
    except (ValueError, configparser.Error, OSError) as error:
        problem = " ".join(str(error).split())
        for folder in (_seen_from(main, candidates), str(candidates)):
            problem = problem.replace(folder, str(main.parent / "conf.d"))
        raise ConfigError(f"supervisord would not read the configuration: {problem}") from None
    found = {group.name: group for group in root.process_group_configs}
    for block in blocks:
        _compare(block, found.get(block.name))


def _relative(main: Path, candidates: Path) -> str:
    """From the main file's folder, which may be a link: `..` leads up from where it really is."""
    return os.path.relpath(os.path.realpath(candidates), os.path.realpath(main.parent))


def _seen_from(main: Path, candidates: Path) -> str:
    """The candidates' folder as supervisord's parser names it."""
    return os.path.join(main.parent, _relative(main, candidates))


def _require_text(main: Path, candidates: Path) -> None:
    """supervisord's parser does not name the file that is no text."""
    for path in (main, *sorted(candidates.glob("*.conf"))):
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not text in UTF-8: {error}") from None


def _with_candidates(main: Path, candidates: Path) -> str:
    """The main file's text, including `candidates` instead of its own conf.d."""
    from supervisor.options import UnhosedConfigParser

    text = main.read_text(encoding="utf-8")
    parser = UnhosedConfigParser()
    parser.read_string(text, str(main))
    parser.expand_here(str(main.parent))
    if not parser.has_option("include", "files"):
        raise ConfigError(f"{main}: [include] files = conf.d/*.conf is missing")
    own = main.parent / "conf.d"
    # Relative, as a pattern must not hold the blanks that the prefix may hold.
    there = _relative(main, candidates)
    patterns = []
    for pattern in parser.get("include", "files").split():
        path = os.path.normpath(os.path.join(main.parent, pattern))
        ours = os.path.dirname(path) == str(own)
        patterns.append(os.path.join(there, os.path.basename(path)) if ours else pattern)
    return f"{text}\n[include]\nfiles = {' '.join(patterns)}\n"


def _compare(block: Expected, group: Any) -> None:
    """What was meant × what supervisord understood."""
    if group is None or len(group.process_configs) != 1:
        raise ConfigError(f"supervisord does not find the program {block.name} in its block")
    process = group.process_configs[0]
    environment = dict(process.environment)
    meant: dict[str, tuple[object, object]] = {
        "name": (block.name, process.name),
        "command": (block.command, tuple(shlex.split(process.command))),
        "environment": (
            dict(block.environment),
            {key: environment.get(key) for key in block.environment},
        ),
        "stdout_logfile": (block.log_file, process.stdout_logfile),
        "autostart": (False, process.autostart),
        "autorestart": (False, process.autorestart),
        "stopasgroup": (False, process.stopasgroup),
        "killasgroup": (True, process.killasgroup),
    }
    for key, (wanted, found) in meant.items():
        if wanted != found:
            raise ConfigError(
                f"supervisord reads {key} of {block.name} as {found!a}, not as {wanted!a}"
            )


# --- what supervisord would not take -------------------------------------------------------------

_LONGEST_PATH = 300
_LONGEST_REASON = 300
_MOST_TRIES = 40  # for one line; each reads everything anew
_MOST_IN_MAIN = 20

_SECTION = re.compile(r"\[(.+)\]")
_OPTION = re.compile(r"(.*?)\s*[=:]\s*(.*)$")
_COMMENT = re.compile(r"(^|\s)[;#].*")
# What supervisord adds to its reasons, and is said otherwise here, or is too long.
_ADDED = re.compile(r" in section '[^']*' \(file: .*?\)$| Available names: .*")
# A section whose programs others may name, in the fewest words that supervisord takes.
_PLAIN = {
    "program": "command=/bin/true\n",
    "eventlistener": "command=/bin/true\nevents=TICK_3600\n",
    "fcgi-program": "command=/bin/true\nsocket=tcp://localhost:1\n",
}
_NAMED_SECTION = re.compile(rf"^\[({'|'.join(_PLAIN)}):([^\]\s:/]+)\]", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Broken:
    """A file that supervisord would choke on, or leave out without a word."""

    path: Path
    line: int | None
    reason: str

    def __str__(self) -> str:
        """`PATH, line N: reason`, in printable ASCII."""
        line = "" if self.line is None else f", line {self.line}"
        path, reason = _ascii(str(self.path)), _ascii(self.reason)
        if len(path) > _LONGEST_PATH:
            path = f"...{path[3 - _LONGEST_PATH :]}"
        return f"{path}{line}: {reason[:_LONGEST_REASON]}"


def _ascii(text: str) -> str:
    return "".join(c if " " <= c <= "~" else ascii(c)[1:-1] for c in text)


def broken_files(main: Path, replaced: Mapping[Path, str] | None = None) -> tuple[Broken, ...]:
    """Every file for which a supervisord that is started on `main`, or reloaded, would end.

    Those come first that cannot be read or are no configuration at all; then those with a value
    that supervisord refuses, found by its own parser, which does not always name the file. Files
    that it would leave out without a word, as it cannot open them, are among them: their programs
    would be gone.

    `replaced`: texts in place of what stands on disk, also of files that do not exist (yet).
    Environment variables, the user and the current folder are those of the caller. Nothing is
    written, and no state of the process is changed, except that modules are imported which
    [rpcinterface:*] sections name, as supervisord does.
    """
    files = _Files(main, replaced or {})
    if _problem(files) == "" and not files.broken:
        return ()
    files.check_each()
    if os.fspath(main) not in files.broken:
        files.check_together()
    return tuple(files.broken.values())


class _Files:
    """The main file and those it includes; each is read once."""

    def __init__(self, main: Path, replaced: Mapping[Path, str]) -> None:
        self.main = os.fspath(main)
        self.included: list[str] = []
        self.broken: dict[str, Broken] = {}
        self._replaced = {_place(os.fspath(path)): text for path, text in replaced.items()}
        self._texts: dict[str, str] = {}
        self._instead: dict[str, str] = {}
        self._is_listing = False

    def text(self, path: str) -> str:
        """What stands in a file; nothing where it cannot be read."""
        if path in self._instead:
            return self._instead[path]
        if path not in self._texts:
            try:
                text = self._read(path)
                self._texts[path] = text.replace("\r\n", "\n").replace("\r", "\n")
            except _Unreadable as problem:
                self.broken[path] = Broken(Path(path), problem.line, str(problem))
                self._texts[path] = ""
        return self._texts[path]

    def _read(self, path: str) -> str:
        given = self._replaced.get(_place(path))
        if given is not None:
            return given
        if path != self.main and os.path.isdir(path):
            return ""  # supervisord takes no notice of it
        return _text_of(path)

    def include(self, path: str) -> str:
        """The text of a file that the main file names."""
        if path not in self.included:
            self.included.append(path)
        return "" if self._is_listing else self.text(path)

    def matching(self, pattern: str) -> list[str]:
        """glob.glob, for which replaced files are there."""
        found = glob.glob(pattern)
        folder, name = os.path.split(pattern)
        for place in glob.glob(folder) if self._replaced else ():
            real = os.path.realpath(place)
            for at, base in self._replaced:
                hidden = base.startswith(".") and not name.startswith(".")
                path = os.path.join(place, base)
                if (
                    at == real and path not in found
                    and fnmatch.fnmatchcase(base, name) and not hidden
                ):  # fmt: skip
                    found.append(path)
        return found

    def check_each(self) -> None:
        """Whether each can be read, and is a configuration."""
        self._list_included()
        for path in (self.main, *self.included):
            text = self.text(path)
            problem = None if path in self.broken else _syntax_problem(path, text)
            if problem is not None:
                self.broken[path] = problem
            if path in self.broken:
                self._instead[path] = _plain(text)

    def _list_included(self) -> None:
        """All of them: supervisord stops at the first that is broken."""
        if _syntax_problem(self.main, self.text(self.main)) is None:
            self._is_listing = True
            _problem(self)
            self._is_listing = False

    def check_together(self) -> None:
        """Find whose values supervisord refuses: the main file's, one included one's, or several's.

        What was found is put out of the way, so that it hides nothing else.
        """
        plain = {path: self._plain_of(path) for path in self.included}
        self._check_main(plain)
        nothing = dict.fromkeys(self.included, "")
        for path in self._unsuspected():
            self._check_beside(path, nothing, plain)
        for _ in self.included:
            problem = _problem(self)
            if problem == "":
                return
            self._blame(self._to_blame(problem), problem, {})

    def _unsuspected(self) -> list[str]:
        return [path for path in self.included if path not in self.broken]

    def _check_main(self, plain: Mapping[str, str]) -> None:
        for _ in range(_MOST_IN_MAIN):
            problem = self._problem_with(plain)
            if problem == "":
                return
            self._blame(self.main, problem, plain)
        self._instead[self.main] = self._plain_of(self.main)

    def _check_beside(
        self, path: str, nothing: Mapping[str, str], plain: Mapping[str, str]
    ) -> None:
        """One file beside the main file: without the others, which is quick, then with them."""
        text = self.text(path)
        alone, beside = {**nothing, path: text}, {**plain, path: text}
        if self._problem_with(alone) == "":
            return
        problem = self._problem_with(beside)
        if problem != "":
            is_same = self._problem_with(alone) == problem
            self._blame(path, problem, alone if is_same else beside)

    def _blame(self, path: str, problem: str, beside: Mapping[str, str]) -> None:
        """`beside`: the texts of the others with which the problem shows."""
        line, mended = self._line_to_blame(path, problem, beside)
        self.broken.setdefault(path, Broken(Path(path), line, _ADDED.sub("", problem)))
        # What others refer to in the main file, its environment above all, stays there.
        is_mended = path == self.main and mended is not None
        self._instead[path] = str(mended) if is_mended else self._plain_of(path)

    def _plain_of(self, path: str) -> str:
        text = _plain(self.text(path))
        if path == self.main and self.included:
            text += f"[include]\nfiles={' '.join(_include_of(self.text(path)).split())}\n"
        return f"[supervisord]\n{text}" if path == self.main else text

    def _to_blame(self, problem: str) -> str:
        """The included file without which the problem is another, else the main file."""
        suspects = self._unsuspected()
        if not suspects or not self._is_changed_without(suspects, problem):
            return self.main
        while len(suspects) > 1:
            half = suspects[: len(suspects) // 2]
            rest = suspects[len(suspects) // 2 :]
            suspects = half if self._is_changed_without(half, problem) else rest
        return suspects[0]

    def _is_changed_without(self, paths: Sequence[str], problem: str) -> bool:
        return self._problem_with({path: self._plain_of(path) for path in paths}) != problem

    def _problem_with(self, instead: Mapping[str, str]) -> str:
        before, self._instead = self._instead, {**self._instead, **instead}
        try:
            return _problem(self)
        finally:
            self._instead = before

    def _line_to_blame(
        self, path: str, problem: str, beside: Mapping[str, str]
    ) -> tuple[int | None, str | None]:
        """The line, and the text without it: else only that of the section, or nothing."""
        text = self.text(path)
        options = list(options_of(text))
        named = [option for option in options if _names(problem, option.section)]
        suspects = [option for option in named or options if option.name]
        suspects.sort(key=lambda option: _mentioned(problem, option))
        for option in suspects[:_MOST_TRIES]:
            without = option.cut_from(text)
            if self._problem_with({**beside, path: without}) != problem:
                return option.first, _without_program(without, option.section, options)
        return min((option.first for option in named), default=None), None


class _Unreadable(Exception):
    def __init__(self, why: str, line: int | None = None) -> None:
        super().__init__(why)
        self.line = line


def _place(path: str) -> tuple[str, str]:
    """Folder and name of a file, by whatever way its folder is reached."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.realpath(folder), name


def _text_of(path: str) -> str:
    """The text of a file as supervisord decodes it; nobody is waited for."""
    try:
        info = os.stat(path)
        if stat.S_ISCHR(info.st_mode) and info.st_rdev == os.stat(os.devnull).st_rdev:
            return ""
        if not stat.S_ISREG(info.st_mode):
            raise _Unreadable("is not a regular file: supervisord could wait for it for ever")
        data = Path(path).read_bytes()
    except OSError as error:
        raise _Unreadable(
            f"cannot be read ({error.strerror}): supervisord would go on without it"
        ) from None
    encoding = locale.getpreferredencoding(False)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _Unreadable(
            f"is not text in {encoding.upper()}: byte 0x{data[error.start]:02x}", line
        ) from None


def _syntax_problem(path: str, text: str) -> Broken | None:
    """What is wrong with a file that is no configuration at all."""
    from supervisor.options import UnhosedConfigParser

    try:
        UnhosedConfigParser().read_file(_Named(text, path))
    except configparser.MissingSectionHeaderError as error:
        why = f"stands before any [section]: {error.line.strip()!a}"
        if text.startswith("\ufeff"):
            why = "the file begins with a byte order mark; save it without"
        return Broken(Path(path), error.lineno, why)
    except configparser.ParsingError as error:
        number, line = error.errors[0]
        return Broken(Path(path), number, f"is neither [section] nor key=value: {line}")
    except Exception as error:
        return Broken(Path(path), None, " ".join(str(error).split()) or type(error).__name__)
    return None


def _problem(files: _Files) -> str:
    """Why supervisord would not take these files, in its own words; nothing where it would."""
    from supervisor import options as supervisors

    class Parser(supervisors.UnhosedConfigParser):  # type: ignore[misc]  # untyped base
        def read(self, filenames: str, **_: Any) -> list[str]:
            before = set(self.sections())
            self.read_file(_Named(files.include(filenames), filenames))
            new = set(self.sections()) - before
            self.section_to_file.update(dict.fromkeys(new, filenames))
            return [filenames]

    options = supervisors.ServerOptions()
    options.configfile = files.main
    options.here = os.path.abspath(os.path.dirname(files.main))
    # supervisord's own way of reading, but for the eyes that it sees the files with.
    read_config = types.FunctionType(
        supervisors.ServerOptions.read_config.__code__,
        {
            **vars(supervisors),
            "UnhosedConfigParser": Parser,
            "glob": types.SimpleNamespace(glob=files.matching),
        },
    )
    try:
        root = read_config(options, _Named(files.text(files.main), files.main))
        _require_start(root)
    except Exception as error:  # by another than ValueError it would end with a traceback
        return " ".join(str(error).split()) or type(error).__name__
    finally:
        options.poller.close()
    return ""


def _require_start(root: Any) -> None:
    """What supervisord looks at after it has read its files, and ends over.

    Raises:
        ValueError: says what is wrong.
    """
    from supervisor.datatypes import name_to_uid

    if root.user is not None and os.getuid() not in (0, name_to_uid(root.user)):
        raise ValueError(f"supervisord.user {root.user!a}: only root can become another user")
    log = os.path.expanduser(root.logfile)
    if root.logfile != "syslog" and not _is_writable(log):
        raise ValueError(f"supervisord.logfile {root.logfile!a}: cannot be written")


def _is_writable(path: str) -> bool:
    there = path if os.path.exists(path) else os.path.dirname(os.path.abspath(path))
    return os.access(there, os.W_OK) and not os.path.isdir(path)


def _plain(text: str) -> str:
    """The sections of a text that others may name, with nothing in them that could be wrong."""
    plain = "".join(
        f"[{kind}:{name}]\n{_PLAIN[kind]}" for kind, name in _NAMED_SECTION.findall(text)
    )
    return f"[supervisord]\n{plain}" if re.search(r"^\[supervisord\]", text, re.M) else plain


def _include_of(text: str) -> str:
    from supervisor.options import UnhosedConfigParser

    parser = UnhosedConfigParser()
    parser.read_string(text)
    return str(parser.get("include", "files", fallback=""))


@dataclass(slots=True)
class Option:
    """One option of a section, and the lines that it takes; without a name the section's own."""

    section: str
    name: str
    value: str
    first: int
    last: int = field(default=0)

    def cut_from(self, text: str) -> str:
        """The text with these lines empty, so that all others keep their numbers."""
        lines = text.split("\n")
        lines[self.first - 1 : self.last] = [""] * (self.last - self.first + 1)
        return "\n".join(lines)


def options_of(text: str) -> Iterator[Option]:
    """The sections and options of a text that parses, with their lines, as configparser sees them.

    In a text as it is split at newlines: a bare carriage return has become one.
    """
    section, option, indent = "", None, 0
    for number, raw in enumerate(text.split("\n"), 1):
        line = _COMMENT.sub("", raw).rstrip()
        if not line:
            continue
        depth = len(line) - len(line.lstrip())
        if option is not None and depth > indent:
            option.value += f"\n{line.strip()}"
            option.last = number
            continue
        if option is not None:
            yield option
            option = None
        indent = depth
        if header := _SECTION.match(line.strip()):
            section = header[1]
            yield Option(section, "", "", number, number)
        elif pair := _OPTION.match(line.strip()):
            option = Option(section, pair[1].lower(), pair[2], number, number)
    if option is not None:
        yield option


def _without_program(text: str, section: str, options: Sequence[Option]) -> str:
    """A program that lost a line may lack it: it becomes the plainest there is."""
    kind = section.partition(":")[0]
    if kind not in _PLAIN:
        return text
    for option in options:
        if option.section == section and option.name:
            text = option.cut_from(text)
    return f"{text}\n[{section}]\n{_PLAIN[kind]}"


def _names(problem: str, section: str) -> bool:
    """Whether a problem is said to be in a section: `[section]`, `'section'`, `section.option`."""
    name = section.partition(":")[2]
    return (
        any(f"{before}{section}{after}" in problem for before, after in ("[]", "''", "'."))
        or f"program section {section} " in problem
        or f"Invalid name: {name!r} " in problem
    )


def _mentioned(problem: str, option: Option) -> int:
    """0 where a problem names an option, 1 where it names its value, else 2."""
    if f"{option.section}.{option.name}" in problem:
        return 0
    value = option.value
    if value and re.search(rf"(?<!\w){re.escape(value)}(?!\w)", problem):
        return 1
    return 2
