"""supervisord's configuration files, read by supervisord's own parser.

Imported inside supervisord itself: nothing heavy is imported here, and nothing of a caller's
process is changed.
"""

from __future__ import annotations

import configparser
import io
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from supervisor_synapse.errors import ConfigError


class _Named(io.StringIO):
    """Text that supervisord's parser takes for the file `name`."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
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
