"""A deployment on disk: where everything stands below `--prefix`, and laying it down.

Nothing outside the prefix is written. What the user may edit is laid down once and never
overwritten. Folders and files that programs are started from belong to the user alone, or we
refuse.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from supervisor_synapse.errors import ConfigError

_DEFAULT_PREFIX = "~/.synapse"

# What supervisord's parser and its two rounds of expansion pass on unchanged. Blanks are quoted
# where they stand in a command.
_SAFE_PREFIX = re.compile(r"/[A-Za-z0-9_@+=:,./-]+( [A-Za-z0-9_@+=:,./-]+)*")

# sun_path holds 108 bytes on Linux and 104 on macOS, and supervisord binds `<socket>.<pid>` first.
_LONGEST_SOCKET_PATH = 92


@dataclass(frozen=True, slots=True)
class Deployment:
    """The paths of one deployment."""

    prefix: Path

    @property
    def etc(self) -> Path:
        return self.prefix / "etc"

    @property
    def settings(self) -> Path:
        return self.etc / "synapse.conf"

    @property
    def main_config(self) -> Path:
        return self.etc / "supervisord.conf"

    @property
    def blocks(self) -> Path:
        return self.etc / "conf.d"

    @property
    def templates(self) -> Path:
        return self.etc / "templates"

    @property
    def links(self) -> Path:
        return self.prefix / "var" / "models"

    @property
    def lib(self) -> Path:
        return self.prefix / "var" / "lib"

    @property
    def registry(self) -> Path:
        return self.lib / "registry.json"

    @property
    def intent(self) -> Path:
        return self.lib / "intent.json"

    @property
    def journal(self) -> Path:
        return self.lib / "journal.json"

    @property
    def state(self) -> Path:
        return self.lib / "state.json"

    @property
    def headers(self) -> Path:
        return self.lib / "headers.json"

    @property
    def generations(self) -> Path:
        return self.lib / "generations"

    @property
    def kept_blocks(self) -> Path:
        return self.generations / "blocks"

    @property
    def trials(self) -> Path:
        return self.lib / "trials.json"

    @property
    def log(self) -> Path:
        return self.prefix / "var" / "log"

    @property
    def history(self) -> Path:
        return self.log / "history.jsonl"

    @property
    def run(self) -> Path:
        return self.prefix / "var" / "run"

    @property
    def socket(self) -> Path:
        return self.run / "supervisor.sock"

    @property
    def pidfile(self) -> Path:
        return self.run / "supervisord.pid"

    @property
    def footprints(self) -> Path:
        return self.lib / "memory.json"

    @property
    def ledger(self) -> Path:
        """The listener's word about memory; the launchers' claims stand beside it."""
        return self.run / "ledger.json"

    @property
    def gateway(self) -> Path:
        """What the gateway reads beside its configuration, and what of that was good."""
        return self.lib / "gateway"

    @property
    def gateway_config(self) -> Path:
        return self.etc / "haproxy.cfg"

    @property
    def gateway_socket(self) -> Path:
        """HAProxy's runtime socket. The launchers look for it beside the ledger."""
        return self.run / "gateway.sock"

    @property
    def discovery_lock(self) -> Path:
        """Held by a discovery until all is done."""
        return self.run / "discover.lock"

    @property
    def lock(self) -> Path:
        """Held by whoever changes blocks, the registry or what is known of them; not for long."""
        return self.run / "deployment.lock"

    def folders(self) -> tuple[Path, ...]:
        """Every folder of the deployment, outer ones first."""
        return (
            self.prefix, self.etc, self.blocks, self.templates, self.prefix / "var", self.links,
            self.lib, self.generations, self.kept_blocks, self.gateway, self.log, self.run,
        )  # fmt: skip

    def block(self, name: str) -> Path:
        """The program block of a model."""
        return self.blocks / f"{name}.conf"

    def rejected(self, name: str) -> Path:
        """A block that failed, with the reason on top."""
        return self.blocks / f"{name}.conf.rejected"

    def record(self, name: str) -> Path:
        """Names the run of a model while it lasts."""
        return self.run / f"{name}.run"

    def log_file(self, name: str) -> Path:
        """What a model's launcher and server print."""
        return self.log / f"{name}.log"


def choose(prefix: str | None) -> Deployment:
    """The deployment at `prefix`, else at $SYNAPSE_PREFIX, else at ~/.synapse.

    Raises:
        ConfigError: the path cannot stand in supervisord's configuration.
    """
    given = prefix or os.environ.get("SYNAPSE_PREFIX") or _DEFAULT_PREFIX
    path = Path(os.path.abspath(os.path.expanduser(given)))
    if not _SAFE_PREFIX.fullmatch(str(path)) or str(path) == "/":
        raise ConfigError(
            f"cannot use the prefix {str(path)!a}: supervisord's configuration takes only ASCII "
            "letters, digits, blanks and _@+=:,./- in a path; choose another with --prefix"
        )
    deployment = Deployment(path)
    if len(str(deployment.socket)) > _LONGEST_SOCKET_PATH:
        raise ConfigError(
            f"cannot use the prefix {path}: {deployment.socket} is longer than "
            f"{_LONGEST_SOCKET_PATH} characters, more than a unix socket can have; choose a "
            "shorter one with --prefix"
        )
    return deployment


def own_command() -> tuple[str, ...]:
    """How supervisord shall run `synapse`: the script beside this interpreter, else the module."""
    script = Path(sys.executable).parent / "synapse"
    if os.access(script, os.X_OK):
        return (str(script),)
    return (sys.executable, "-m", "supervisor_synapse.cli")


def launcher_command() -> tuple[str, ...]:
    """How supervisord shall run `synapse-run`."""
    script = Path(sys.executable).parent / "synapse-run"
    if os.access(script, os.X_OK):
        return (str(script),)
    return (sys.executable, "-m", "supervisor_synapse.launcher")


def lay_down(deployment: Deployment, files: dict[Path, str]) -> tuple[Path, ...]:
    """Make the folders, and those of `files` (path → text) that do not exist; what was written.

    Raises:
        ConfigError: a folder cannot be made or written, or is not private.
    """
    try:
        for folder in deployment.folders():
            folder.mkdir(mode=0o700, parents=folder == deployment.prefix, exist_ok=True)
        require_private(_executed_from(deployment))
        return tuple(path for path, text in files.items() if _create(path, text))
    except OSError as error:
        raise ConfigError(
            f"cannot write below {deployment.prefix}: {error.strerror}: {error.filename}; "
            "make it yours, or choose another with --prefix"
        ) from None


def _create(path: Path, text: str) -> bool:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        # Half of it would never be overwritten, and supervisord would go on reading it.
        path.unlink()
        raise
    return True


def require_laid_down(deployment: Deployment) -> None:
    """Refuse to go on without a deployment, or with one that others may write to.

    Raises:
        ConfigError: there is none, or it is not private.
    """
    if not deployment.main_config.exists():
        raise ConfigError(
            f"{deployment.prefix} holds no deployment: `synapse init` (or `synapse up`) makes one"
        )
    require_private(_executed_from(deployment))


def _executed_from(deployment: Deployment) -> Iterator[Path]:
    """What decides which programs are started, and as what."""
    yield from deployment.folders()
    yield from (deployment.main_config, deployment.settings)
    for folder, pattern in ((deployment.blocks, "*.conf"), (deployment.templates, "*.j2")):
        yield from sorted(folder.glob(pattern))


def require_private(paths: Iterable[Path]) -> None:
    """Refuse what others may write: supervisord and we execute from these.

    Raises:
        ConfigError: one line for each path, with the command that mends it.
    """
    problems = []
    for path in paths:
        try:
            info = path.stat()
        except OSError:
            continue
        if info.st_uid not in (os.getuid(), 0):
            problems.append(f"{path}: belongs to user {info.st_uid}, not to you: chown it")
        if stat.S_IMODE(info.st_mode) & 0o022:
            problems.append(
                f"{path}: group or others may write here, and programs are started from it: "
                f"chmod go-w {path}"
            )
    if problems:
        raise ConfigError(problems)
