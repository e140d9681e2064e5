"""docs/configuration.md and etc/synapse.conf say of each key what the settings model says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from supervisor_synapse import config, reference
from supervisor_synapse.config import SECTIONS
from supervisor_synapse.core.settings import Settings
from supervisor_synapse.render import shipped_settings

DOCS = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
TIERS = ("tier:fast", "tier:balanced", "tier:powerful")
KEYS = [(section, key) for section, model in SECTIONS.items() for key in model.model_fields]


def a_section(name: str) -> str:
    """One that stands for all of its kind."""
    return {"tier:TIER": "tier:fast", "model:GLOB": "model:x*"}.get(name, name)


def lines_of_the_shipped_file() -> list[tuple[str, str, str]]:
    """Section, key and value, whether commented out or not; a value ends before its comment."""
    found, section = [], ""
    for line in shipped_settings().splitlines():
        if header := re.fullmatch(r";?\[([^\]]+)\].*", line):
            section = header[1]
        elif pair := re.fullmatch(r";?([a-z_]+) =(.*?)( ;.*)?", line):
            found.append((section, pair[1], pair[2].strip()))
    return found


SHIPPED = lines_of_the_shipped_file()


def test_the_documentation_is_what_the_generator_writes() -> None:
    """`make docs` writes it anew."""
    assert DOCS.read_text() == reference.document()


def test_the_documentation_is_plain_text() -> None:
    assert reference.document().isascii()


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_every_key_is_described_with_an_example_that_is_taken(section: str, key: str) -> None:
    """An example also differs from what holds anyway."""
    field = SECTIONS[section].model_fields[key]
    assert field.description
    assert field.description.endswith(".")
    (example,) = field.examples or ()
    said = config.parse(f"[{a_section(section)}]\n{key} = {example}\n")
    assert said != config.parse(f"[{a_section(section)}]\n")


@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_has_an_introduction(name: str) -> None:
    page = reference.document()
    assert f"## `[{name}]`\n\n" in page
    assert SECTIONS[name].__doc__


def test_every_argument_that_is_refused_is_named_with_the_way_out() -> None:
    table = reference.document().partition("## What `args` does not take")[2]
    for option, why in config.OWNED_ARGUMENTS.items():
        (row,) = [line for line in table.splitlines() if f"`{option}`" in line]
        assert why.replace(" here", " in the same section") in row


def test_the_shipped_file_has_every_key_once_and_no_other() -> None:
    meant = {
        (section, key)
        for name, key in KEYS
        for section in {"tier:TIER": TIERS, "model:GLOB": ("model:qwen*-q4_k_m",)}.get(
            name, (name,)
        )
    }
    shipped = [(section, key) for section, key, _ in SHIPPED]
    assert sorted(shipped) == sorted(meant)


@pytest.mark.parametrize(
    ("section", "key", "value"), [one for one in SHIPPED if not one[0].startswith("model:")]
)
def test_the_shipped_file_shows_the_default(section: str, key: str, value: str) -> None:
    assert config.parse(f"[{section}]\n{key} = {value}\n") == Settings()


def test_defaults_of_the_model_are_those_of_the_values_inside() -> None:
    """Nothing said and every default said are the same settings, so the page cannot lie."""
    text = "".join(
        f"[{name}]\n"
        + "".join(
            f"{key} = {reference.shown(field.default)}\n"
            for key, field in model.model_fields.items()
            if field.default not in (None, "", ())
        )
        for name, model in SECTIONS.items()
        if not name.startswith(("tier:", "model:"))
    )
    assert config.parse(text) == Settings()
