"""Programs → program blocks. Nothing from outside reaches a block but through an allow-list.

Rendering gives text; the caller decides what becomes of it. Every value that a template sees has
passed `_plain` or `_quoted`, so that no file name, setting or header can open a section, start a
comment, or have supervisord expand something.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

import jinja2

from supervisor_synapse.core.catalog import PROGRAM_NAME, RESERVED_NAMES
from supervisor_synapse.core.gateway import GatewayPaths, Upstream
from supervisor_synapse.core.model import Program
from supervisor_synapse.core.plan import mib
from supervisor_synapse.core.settings import GatewaySettings, StopPolicy
from supervisor_synapse.errors import ConfigError

MAIN_TEMPLATE = "supervisord.conf.j2"
PROGRAM_TEMPLATE = "program.conf.j2"
GATEWAY_TEMPLATE = "haproxy.cfg.j2"
GATEWAY_BLOCK_TEMPLATE = "gateway.conf.j2"
GATEWAY_LUA = "gateway.lua"

_PATH = re.compile(r"/[A-Za-z0-9_@+=:,./-]*( [A-Za-z0-9_@+=:,./-]+)*")
_ARGUMENT = re.compile(r"[A-Za-z0-9_@%+=:,./\[\]{}\"*^| -]*")
_LONGEST_ARGUMENT = 1000

# An aborting server must not start a debugger.
_ENVIRONMENT: Mapping[str, str] = {"GGML_NO_BACKTRACE": "1"}

# The keys that a rendered block must have, no more and no fewer, whatever the template says.
BLOCK_KEYS = frozenset(
    {
        "command", "directory", "environment", "priority", "autostart", "autorestart",
        "startsecs", "startretries", "exitcodes", "stopsignal", "stopwaitsecs", "stopasgroup",
        "killasgroup", "redirect_stderr", "stdout_logfile", "stdout_logfile_maxbytes",
        "stdout_logfile_backups",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What blocks say beside the program itself."""

    launcher: tuple[str, ...]
    engine: str  # its path
    stop: StopPolicy
    directory: str
    log_folder: str
    run_folder: str


@dataclass(frozen=True, slots=True)
class Block:
    """One rendered block, and what supervisord must find in it."""

    name: str
    text: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    log_file: str


class ValueRefused(ConfigError):
    """One value does not pass the allow-list; it costs only the program that it belongs to."""


def require_safe(around: Surroundings) -> None:
    """Refuse surroundings with which no block could be written.

    Raises:
        ConfigError: names the path.
    """
    for path in (around.launcher[0], around.engine, around.directory, around.log_folder,
                 around.run_folder):  # fmt: skip
        try:
            _plain(path)
        except ValueRefused as refused:
            raise ConfigError(str(refused)) from None


def is_safe_path(path: str) -> bool:
    """Whether `path` may stand in a block as it is."""
    return (
        bool(_PATH.fullmatch(path)) and len(path) <= _LONGEST_ARGUMENT and ".." not in
        path.split("/")
    )  # fmt: skip


class Templates:
    """The shipped templates, each overridden by a file of the same name in `overrides`."""

    def __init__(self, overrides: Path | None = None) -> None:
        self._overrides = overrides
        self._environment = jinja2.Environment(
            loader=jinja2.FunctionLoader(self._source),
            undefined=jinja2.StrictUndefined,
            autoescape=False,  # noqa: S701 - no markup; values pass the allow-list
            keep_trailing_newline=True,
            trim_blocks=True,
        )

    def render(self, template: str, values: Mapping[str, object]) -> str:
        """The text of `template`.

        Raises:
            ConfigError: the template is broken; names it and the line.
        """
        try:
            return self._environment.get_template(template).render(values)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"template {error.name or template}, line {error.lineno}: {error.message}"
            ) from None
        except (
            jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError,
            RecursionError, TypeError, ValueError,
        ) as error:  # fmt: skip
            raise ConfigError(f"template {template}: {error}") from None
        except OSError as error:
            raise ConfigError(f"cannot read template {template}: {error}") from None

    def _source(self, name: str) -> str | None:
        override = None if self._overrides is None else self._overrides / name
        if override is None or not os.path.lexists(override):
            return shipped(name)
        if not override.is_file():
            raise ConfigError(f"{override}: is not a regular file; remove it, or mend the link")
        return override.read_text(encoding="utf-8")


def shipped(name: str) -> str | None:
    """The text of a template that came with the package."""
    try:
        return _shipped_text("templates", name)
    except (FileNotFoundError, ModuleNotFoundError):
        return None


def shipped_settings() -> str:
    """The synapse.conf that `synapse init` lays down."""
    return _shipped_text("etc", "synapse.conf")


def _shipped_text(folder: str, name: str) -> str:
    """templates/ and etc/ stand at the top of a checkout, and inside an installed package."""
    package = resources.files("supervisor_synapse")
    inside = package / folder / name
    if inside.is_file():
        return inside.read_text(encoding="utf-8")
    return Path(str(package)).parent.joinpath(folder, name).read_text(encoding="utf-8")


def render_main(templates: Templates, prefix: str, synapse: Sequence[str], socket: str) -> str:
    """supervisord's main file."""
    return templates.render(
        MAIN_TEMPLATE,
        {
            "prefix": _plain(prefix),
            "synapse": " ".join(_quoted(word) for word in synapse),
            "prefix_argument": _quoted(prefix),
            "socket": _plain(socket),
            "log_dir": _plain(f"{prefix}/var/log"),
            "run_dir": _plain(f"{prefix}/var/run"),
        },
    )


def render_program(templates: Templates, program: Program, around: Surroundings) -> Block:
    """One model's block.

    Raises:
        ConfigError: a value does not pass the allow-list, or the template is broken.
    """
    if not PROGRAM_NAME.fullmatch(program.name) or program.name in RESERVED_NAMES:
        raise ValueRefused(f"{program.name[:200]!a} is not a name that a model's program may have")
    command = _command(program, around)
    log_file = _plain(f"{around.log_folder}/{program.name}.log")
    text = templates.render(
        PROGRAM_TEMPLATE,
        {
            "name": program.name,
            "summary": _summary(program),
            "command": " ".join(_quoted(word) for word in command),
            "directory": _plain(around.directory),
            "environment": ",".join(f'{key}="{value}"' for key, value in _ENVIRONMENT.items()),
            "priority": 100 + program.priority,
            "stop_wait_seconds": around.stop.longest_seconds,
            "log_file": log_file,
        },
    )
    return Block(program.name, text, command, _ENVIRONMENT, log_file)


def render_gateway(
    templates: Templates,
    settings: GatewaySettings,
    upstreams: Sequence[Upstream],
    paths: GatewayPaths,
) -> str:
    """HAProxy's configuration.

    Raises:
        ConfigError: a value does not pass the allow-list, or the template is broken.
    """
    address = Upstream("gateway", settings.host, settings.port).address
    certificate = settings.tls_certificate
    return templates.render(
        GATEWAY_TEMPLATE,
        {
            "bind": address,
            "bind_options": f" ssl crt {_word(certificate)}" if certificate else "",
            "key_file": _word(settings.api_key_file) if settings.api_key_file else "",
            "max_connections": settings.max_connections,
            "max_body_bytes": settings.max_body_bytes,
            "hold_seconds": settings.hold_seconds,
            "backends": [{"name": _name(one.name), "address": one.address} for one in upstreams],
            **{key: _word(path) for key, path in asdict(paths).items()},
        },
    )


def render_gateway_block(
    templates: Templates,
    command: Sequence[str],
    directory: str,
    log_file: str,
    settings: GatewaySettings,
) -> str:
    """supervisord's program for the gateway.

    Raises:
        ConfigError: a value does not pass the allow-list, or the template is broken.
    """
    return templates.render(
        GATEWAY_BLOCK_TEMPLATE,
        {
            "command": " ".join(_quoted(word) for word in command),
            "directory": _plain(directory),
            "log_file": _plain(log_file),
            "host": settings.host,
            "port": settings.port,
        },
    )


def _name(name: str) -> str:
    if not PROGRAM_NAME.fullmatch(name) or name in RESERVED_NAMES:
        raise ValueRefused(f"{name[:200]!a} is not a name that a model's program may have")
    return name


def _word(path: str) -> str:
    """A path as one word of HAProxy's."""
    return _plain(path).replace(" ", "\\ ")


def _command(program: Program, around: Surroundings) -> tuple[str, ...]:
    projector = () if program.projector_path is None else ("--mmproj", program.projector_path)
    return (
        *around.launcher,
        "--drain", str(around.stop.drain_seconds),
        "--term", str(around.stop.term_seconds),
        "--record", _plain(f"{around.run_folder}/{program.name}.run"),
        "--ledger", _plain(f"{around.run_folder}/ledger.json"),
        "--", _plain(around.engine), "--model", program.model_path, *projector, *program.arguments,
    )  # fmt: skip


def _summary(program: Program) -> str:
    """A line for a person, made of values of ours alone."""
    return (
        f"{program.role.value}, {program.tier.label}, "
        f"{_count(program.parameters)} parameters, {mib(program.size_bytes)} on disk"
    )


def _count(parameters: int) -> str:
    """`1.54B`, `268M`, `34K`."""
    for unit, size, decimals in (("B", 10**9, 2), ("M", 10**6, 0), ("K", 10**3, 0)):
        if parameters >= size:
            return f"{parameters / size:.{decimals}f}{unit}"
    return str(parameters)


def _plain(path: str) -> str:
    """A path that may stand as a value of its own."""
    if not is_safe_path(path):
        raise ValueRefused(
            f"{path[:200]!a} cannot stand in a program block: only ASCII letters, digits, blanks "
            "and _@+=:,./- may; reach it through a link with such a name"
        )
    return path


def _quoted(word: str) -> str:
    """A word of a command, as supervisord's shlex and expansion will give it back."""
    if not _ARGUMENT.fullmatch(word) or len(word) > _LONGEST_ARGUMENT:
        raise ValueRefused(f"{word[:200]!a} cannot stand in a command: it has a character that "
                          "supervisord's configuration would not pass on")  # fmt: skip
    return shlex.quote(word).replace("%", "%%")
