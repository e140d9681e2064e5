"""Checks of what was written: settings, the main file, blocks, and the state beside them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from supervisor_synapse import render
from supervisor_synapse.adapters import config_files
from supervisor_synapse.adapters import deployment as deployments
from supervisor_synapse.adapters.generations import digest
from supervisor_synapse.core.findings import Finding, error, fine, note, warning
from supervisor_synapse.doctor.case import Block, Case, server_words

_LARGEST_STATE_BYTES = 64 * 1024 * 1024
# Sections without which a part of this does not work, and which part.
_NEEDED = {
    "unix_http_server": "nobody can talk to supervisord",
    "rpcinterface:supervisor": "supervisorctl gets no answer",
    "rpcinterface:synapse": "no model is shown, and no command is taken",
    "eventlistener:synapse": "no model is started or healed",
    "include": "supervisord reads no model's block",
}
_USEFUL = {"ctlplugin:synapse": "supervisorctl has no `models`, `enable`, `swap` and so on"}


def check_settings(case: Case) -> Iterator[Finding]:
    """synapse.conf: every mistake at once, and whether it was applied."""
    where = case.deployment.settings
    for problem in case.settings_problems:
        text = problem.removeprefix(f"{where}: ")
        yield error(
            "settings-invalid", str(where), text, "correct it; what was applied goes on meanwhile"
        )
    if case.settings_problems:
        return
    if case.registry.generation and case.registry.settings != case.settings:
        yield note(
            "settings-not-applied", str(where), "says something else than what was applied",
            "`synapse discover` applies it, `synapse discover --dry-run` shows what would change",
        )  # fmt: skip
    yield fine(str(where), "valid")


def check_main_file(case: Case) -> Iterator[Finding]:
    """supervisord's own file: what supervisord would end over, and what is missing of ours."""
    main = case.deployment.main_config
    if not case.is_laid_down:
        yield note(
            "not-laid-down", str(case.deployment.prefix), "holds no deployment yet",
            "`synapse up` makes one, and starts it",
        )  # fmt: skip
        return
    for broken in config_files.broken_files(main):
        place = str(broken.path) if broken.line is None else f"{broken.path}, line {broken.line}"
        yield error(
            "config-broken", place, broken.reason,
            "correct it: supervisord would not start with it, and refuses a reload",
        )  # fmt: skip
    yield from _missing_sections(case)
    yield fine(str(main), "read by supervisord's own parser")


def _missing_sections(case: Case) -> Iterator[Finding]:
    main = case.deployment.main_config
    for section, without in {**_NEEDED, **_USEFUL}.items():
        if case.options_of(section) is None:
            make = error if section in _NEEDED else _useful
            lines = _shipped(case, section)
            yield make("section-missing", str(main), f"lacks [{section}]: {without}",
                       "add these lines, then `supervisorctl reload`", lines)  # fmt: skip
    included = (case.options_of("include") or {}).get("files", "")
    ours = case.deployment.blocks
    patterns = [main.parent / pattern for pattern in included.split()]
    if included and not any(pattern.parent == ours for pattern in patterns):
        yield error(
            "blocks-not-included", str(main), f"[include] does not name {ours.name}/*.conf: "
            "supervisord reads no model's block", "add it to `files`, then `supervisorctl reload`",
        )  # fmt: skip


def _useful(name: str, subject: str, message: str, mend: str, lines: tuple[str, ...]) -> Finding:
    found = warning(name, subject, message, mend)
    return Finding(found.severity, name, subject, message, mend, lines)


def _shipped(case: Case, section: str) -> tuple[str, ...]:
    """A section as `synapse init` lays it down."""
    text = render.render_main(
        render.Templates(), str(case.deployment.prefix), deployments.own_command(),
        str(case.deployment.socket),
    )  # fmt: skip
    found = re.search(rf"^\[{re.escape(section)}\]\n(?:[^\[\n].*\n)*", text, re.MULTILINE)
    lines = found[0].splitlines() if found else []
    return tuple(line for line in lines if not line.startswith(";"))


def check_blocks(case: Case) -> Iterator[Finding]:
    """etc/conf.d: hand edits, what lies beside them, and what supervisord does not know."""
    ours = case.registry.digests()
    for block in case.blocks:
        yield from _block_as_it_stands(case, block, ours.get(block.name))
        yield from _block_as_held(case, block)
    yield from _beside(case)
    yield fine(str(case.deployment.blocks), f"{len(case.blocks)} blocks")


def _block_as_it_stands(
    case: Case, block: Block, written: tuple[str, ...] | None
) -> Iterator[Finding]:
    if written is not None and digest(block.text) not in written:
        yield note(
            "block-edited", str(block.path), "was edited by hand; discovery keeps it as it is",
            f"leave it; `synapse discover --force {block.name}` takes what discovery would write",
        )  # fmt: skip
    for flag in ("--model", "-m"):
        words = block.server
        path = words[words.index(flag) + 1] if flag in words[:-1] else ""
        if path and not Path(path).exists():
            yield warning(
                "block-model-missing", str(block.path), f"its model is not there: {path}",
                "download it again (`synapse pull`), or `synapse discover` removes the block",
            )  # fmt: skip


def _block_as_held(case: Case, block: Block) -> Iterator[Finding]:
    """What supervisord runs or would run of it, where there is one."""
    answers = case.supervisord
    name = re.search(r"^\[program:([^\]\s]+)\]", block.text, re.MULTILINE)
    if answers.processes is None or name is None or block.name in case.registry.untold:
        return
    process = answers.processes.get(name[1])
    if process is None:
        yield warning(
            "block-unknown", str(block.path), "supervisord does not know this program yet",
            "`supervisorctl update`",
        )  # fmt: skip
    elif _held(case, name[1], process.pid) not in ((), block.runs):
        yield warning(
            "block-not-taken-up", str(block.path),
            "says another command than the one that runs, or that supervisord holds",
            "`supervisorctl update`",
        )  # fmt: skip


def _held(case: Case, name: str, pid: int) -> tuple[str, ...]:
    """The command of a program, of a server without its launcher; () where it cannot be seen.

    What supervisord has read may be newer than what it runs.
    """
    running = case.process(pid) if pid else None
    if running is not None:
        return server_words(running.command)
    words = _words((case.supervisord.commands or {}).get(name, ""))
    return server_words(words) or words


def _words(command: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(command))
    except ValueError:
        return ()


def _beside(case: Case) -> Iterator[Finding]:
    for path in sorted(case.deployment.blocks.glob("*.conf.*")):
        name, _, kind = path.name.rpartition(".conf.")
        if kind == "new":
            yield note(
                "block-new-beside", str(path), f"{name} was edited by hand, and discovery would "
                "write something else",
                f"compare the two; `synapse discover --force {name}` takes this one",
            )  # fmt: skip
        elif kind == "rejected":
            yield warning(
                "block-rejected-beside", str(path), "a block that failed, with the reason on top; "
                "the one that was good before serves",
                f"mend what the reason says, then `synapse discover --force {name}`; or remove it",
            )  # fmt: skip
        elif kind == "old":
            yield note(
                "block-old-beside", str(path), f"the hand-edited block of {name} that was replaced",
                "remove it when it is of no use any more",
            )  # fmt: skip


def check_state(case: Case) -> Iterator[Finding]:
    """var/lib: files that are torn, and such as were set aside."""
    paths = sorted(case.deployment.lib.glob("*.json"))
    for path in paths:
        why = _torn(path)
        if why:
            yield warning(
                "state-torn", str(path), f"{why}; it will be set aside and rebuilt",
                "look whether the disk is full or failing",
            )  # fmt: skip
    for path in sorted(case.deployment.lib.glob("*.corrupt")):
        yield note(
            "state-set-aside", str(path), "was torn, and is set aside; what it said is lost",
            "remove it; look whether the disk was full",
        )  # fmt: skip
    yield fine(str(case.deployment.lib), f"{len(paths)} files")


def _torn(path: Path) -> str:
    try:
        if not path.is_file():
            return "is no regular file"
        if path.stat().st_size > _LARGEST_STATE_BYTES:
            return "is too large to be ours"
        json.loads(path.read_bytes())
    except OSError as failure:
        return f"cannot be read ({failure.strerror})"
    except (ValueError, RecursionError):
        return "is torn"
    return ""
