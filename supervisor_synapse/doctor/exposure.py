"""Checks of secrets: none in a command line or a block, none in a file that others may read.

What a secret is never reaches a finding; only where it stands.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from supervisor_synapse.adapters import config_files
from supervisor_synapse.core.findings import Finding, error, fine, warning
from supervisor_synapse.doctor.case import SERVER, Block, Case
from supervisor_synapse.doctor.permissions import others_may_read

_KEY_FLAGS = {
    "--api-key": "put it into a file of mode 0600 and name that: --api-key-file FILE",
    "--hf-token": "log in with `hf auth login`, which keeps it in a file",
    "-hft": "log in with `hf auth login`, which keeps it in a file",
}
_SECRET_NAMES = re.compile(
    r"\b(HF_TOKEN|HUGGING_?FACE_(?:HUB_)?TOKEN|LLAMA_API_KEY|[A-Z_]*(?:API_KEY|SECRET|PASSWORD))\s*="
)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


def check_keys(case: Case) -> Iterator[Finding]:
    """Command lines, which every user of this machine can read; and environment= lines."""
    for block in case.blocks:
        for flag in _key_flags(block.server):
            yield error(
                "key-in-command", str(block.path),
                f"{flag} stands in its command, which everybody on this machine can read",
                _KEY_FLAGS[flag],
            )  # fmt: skip
        yield from _in_environment(block.path, block.text)
    yield from _in_environment(case.deployment.main_config, case.main)
    for process in case.processes:
        if process.user != os.getuid() or process.program != SERVER:
            continue
        for flag in _key_flags(process.command):
            yield warning(
                    "key-in-process", f"{process.program} (pid {process.pid})",
                    f"was started with {flag}, which everybody on this machine can read",
                    _KEY_FLAGS[flag],
                )  # fmt: skip
    yield fine("keys", "none in a command line")


def _key_flags(words: Iterable[str]) -> list[str]:
    said = {word.partition("=")[0] for word in words}
    return [flag for flag in _KEY_FLAGS if flag in said]


def _in_environment(path: Path, text: str) -> Iterator[Finding]:
    for option in config_files.options_of(text):
        if option.name != "environment":
            continue
        names = set(_SECRET_NAMES.findall(option.value))
        if not names and _TOKEN.search(option.value):
            names = {"a Hugging Face token"}
        for name in sorted(names):
            yield warning(
                "key-in-environment", f"{path}, line {option.first}",
                f"{name} stands in environment= of [{option.section}]",
                "log in with `hf auth login`, or name a file of mode 0600 (--api-key-file)",
            )  # fmt: skip


def check_key_files(case: Case) -> Iterator[Finding]:
    """Files that hold keys, tokens or passwords."""
    files = set(_key_files(case))
    for name, path in sorted(files):
        if not path.exists():
            yield error(
                "key-file-missing", name, f"its key file {path} is not there",
                "make it (mode 0600), with one key a line",
            )  # fmt: skip
    secret = {path: "holds keys" for _, path in files}
    secret |= {path: "holds your token" for path in (_token_file(),) if path.exists()}
    if re.search(r"^\s*password\s*=", case.main, re.MULTILINE):
        secret[case.deployment.main_config] = "holds a password"
    for path, mode in others_may_read(secret):
        yield error(
            "key-file-open", str(path), f"{secret[path]}, and has mode {mode:04o}: others may "
            "read it", f"chmod 600 {path}",
        )  # fmt: skip
    yield fine("key files", f"{len(secret)} looked at")


def _key_files(case: Case) -> Iterator[tuple[str, Path]]:
    for block in case.blocks:
        named = block.served.api_key_file if block.served is not None else None
        if named:
            yield block.name, _absolute(case, block, named)


def _absolute(case: Case, block: Block, named: str) -> Path:
    """Relative to where the program is started."""
    for option in config_files.options_of(block.text):
        if option.name == "directory":
            return Path(option.value) / named
    return case.deployment.prefix / named


def _token_file() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_TOKEN_PATH)
