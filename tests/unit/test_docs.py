"""The pages say what is so: links lead somewhere, commands and settings exist, examples run."""

from __future__ import annotations

import argparse
import configparser
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from supervisor.supervisorctl import DefaultControllerPlugin

from supervisor_synapse import cli, config
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.adapters.gpu import drivers
from supervisor_synapse.adapters.gpu.readings import Unreadable
from supervisor_synapse.core.model import Device, FailureClass, Phase
from supervisor_synapse.plugin.ctl import SynapseControllerPlugin

CHECKOUT = Path(__file__).resolve().parents[2]
DOCS = CHECKOUT / "docs"
PAGES = [
    *(CHECKOUT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(DOCS.glob("*.md")),
]
READ = [page for page in PAGES if page.name != "CHANGELOG.md"]  # what is now, not what was

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_SYNAPSE = re.compile(
    r"(?<![\w/.-])(?<!-u )(?<!exec )synapse(?: --prefix \S+)? ([a-z]+)\b([^|`;&#)]*)"
)
_CTL = re.compile(r"(?<![\w/.=-])(?:supervisorctl|sctl)((?: -[csup] \S+| …)*) ([a-z]+)\b")
_CONSOLE = ("console", "sh", "bash")
_INSTALLS = ("supervisor", "supervisord")  # words after `synapse` that are none of its commands


def _text(page: Path) -> str:
    return page.read_text("utf-8")


def _prose(page: Path) -> str:
    return _FENCE.sub("", _text(page))


def _fences(page: Path, *languages: str) -> list[str]:
    return [body for language, body in _FENCE.findall(_text(page)) if language in languages]


def _anchors(page: Path) -> set[str]:
    """As they are made of headings: letters, digits, hyphens and underscores."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} (.+)$", _prose(page), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
        if found[slug]:
            found[f"{slug}-{found[slug]}"] = 0
    return set(found)


def _commands(page: Path) -> Iterator[str]:
    """What a reader would type: spans of code, and what follows a prompt."""
    yield from _SPAN.findall(_prose(page))
    for body in _fences(page, *_CONSOLE):
        for line in body.replace("\\\n", " ").splitlines():
            if line.startswith("$ "):
                yield line[2:].partition(" #")[0]


# --- links ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    """Of the links that stay within the checkout."""
    broken = []
    for link in _LINK.findall(_prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        is_there = target.exists() and target.is_relative_to(CHECKOUT)
        if not is_there or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    assert not broken


def test_the_index_names_every_page() -> None:
    named = set(_LINK.findall(_text(DOCS / "README.md")))
    assert {page.name for page in DOCS.glob("*.md")} - {"README.md"} <= named


@pytest.mark.parametrize("state", [*Phase, *FailureClass], ids=lambda state: str(state.value))
def test_operations_has_a_heading_for_each_phase_and_failure_class(
    state: Phase | FailureClass,
) -> None:
    assert state.value in _anchors(DOCS / "operations.md")


# --- commands ------------------------------------------------------------------------------------


def _subcommands() -> dict[str, argparse.ArgumentParser]:
    actions = cli._parser()._actions
    (found,) = [one for one in actions if isinstance(one, argparse._SubParsersAction)]
    return dict(found.choices)


def _verbs() -> set[str]:
    plugins = (DefaultControllerPlugin, SynapseControllerPlugin)
    return {name[3:] for plugin in plugins for name in dir(plugin) if name.startswith("do_")}


@pytest.mark.parametrize("page", READ, ids=lambda page: page.name)
def test_every_synapse_command_and_its_options_exist(page: Path) -> None:
    known, wrong = _subcommands(), []
    for command in _commands(page):
        for name, rest in _SYNAPSE.findall(command):
            if name in _INSTALLS:
                continue
            options = set(re.findall(r"(?<!\S)\[?(--[a-z-]+)", rest))
            if name not in known or options - set(known[name]._option_string_actions):
                wrong.append(command)
    assert not wrong


@pytest.mark.parametrize("page", READ, ids=lambda page: page.name)
def test_every_supervisorctl_verb_exists(page: Path) -> None:
    named = {verb for command in _commands(page) for _, verb in _CTL.findall(command)}
    assert named <= _verbs()


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))
    spans = [span for page in READ for span in _commands(page)]
    assert {name for span in spans for name in re.findall(r"^make ([a-z]+)", span)} <= targets


# --- what stands in fences -----------------------------------------------------------------------

_OURS = re.compile(r"^\[(synapse|probe|restart|stop|tier:\w+|model:\S+)\]$", re.MULTILINE)


def _ini_fences() -> list[Any]:
    return [
        pytest.param(body, id=f"{page.name}-{number}")
        for page in PAGES
        for number, body in enumerate(_fences(page, "ini"))
    ]


@pytest.mark.parametrize("body", _ini_fences())
def test_ini_can_be_read_and_settings_are_taken(body: str) -> None:
    parser = configparser.RawConfigParser(inline_comment_prefixes=(";", "#"))
    parser.read_string(body)
    assert parser.sections()
    if _OURS.search(body):
        config.parse(body)


def test_toml_and_json_can_be_read() -> None:
    for page in PAGES:
        for body in _fences(page, "toml"):
            tomllib.loads(body)
        for body in _fences(page, "json"):
            json.loads(body)


def test_the_python_of_extending_runs(tmp_path: Path) -> None:
    """Its device reader included, on a device and on a broken one."""
    names: dict[str, Any] = {}
    for body in _fences(DOCS / "extending.md", "python"):
        exec(compile(body, "extending.md", "exec"), names)  # noqa: S102 - our own page
    card = tmp_path / "class" / "acme" / "card0"
    card.mkdir(parents=True)
    (card / "memory_total").write_text("1000")
    with pytest.raises(Unreadable):
        names["read"](sysfs=tmp_path)
    (card / "memory_used").write_text("400")
    acme = drivers.Driver("Acme", names["ACME"].devices, lambda _: names["read"](sysfs=tmp_path))
    device = Device("ACME0", 1000, 0, "Acme X1")
    (told,) = drivers.read_all([device], {}, ask_engine=list, drivers=[acme])
    assert (told.free_bytes, told.problem) == (600, "")


# --- files and modules ---------------------------------------------------------------------------


def test_files_names_every_path_of_a_deployment() -> None:
    text, prefix = _text(DOCS / "files.md"), Path("/prefix")
    deployment = Deployment(prefix)
    paths = [
        value for name in dir(Deployment)
        if isinstance(value := getattr(deployment, name), Path) and value != prefix
    ]  # fmt: skip
    named = {str(path.relative_to(prefix)) for path in paths}
    assert {path for path in named if path not in text} == set()


def test_the_rooms_of_the_design_name_every_module() -> None:
    (rooms, *_) = _fences(DOCS / "design.md", "")
    package = CHECKOUT / "supervisor_synapse"
    modules = {path.name for path in package.rglob("*.py")} - {"__init__.py", "__main__.py"}
    assert {name for name in modules if not re.search(rf"(?<![\w]){name}", rooms)} == set()


@pytest.mark.parametrize("name", ["extending.md", "design.md"])
def test_files_of_the_checkout_that_are_named_exist(name: str) -> None:
    spans = _SPAN.findall(_prose(DOCS / name))
    paths = [
        span for span in spans
        if re.fullmatch(r"(supervisor_synapse|tests|docs|etc|templates)/[\w./-]+", span)
        and "NAME" not in span and not span.startswith("etc/conf.d")
    ]  # fmt: skip
    assert [path for path in paths if not (CHECKOUT / path).exists()] == []
