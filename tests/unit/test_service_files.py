"""What other programs start us by: containers, systemd, launchd. They name what there is, agree
with each other, and leave models the time to drain.
"""

from __future__ import annotations

import configparser
import fnmatch
import plistlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from supervisor_synapse import cli, config
from supervisor_synapse.core.settings import StopPolicy

CHECKOUT = Path(__file__).resolve().parents[2]
DOCKER = CHECKOUT / "etc" / "docker"
COMPOSE_FILES = sorted(DOCKER.glob("compose*.yml"))

# What `synapse up` gives supervisord beyond the longest stop of a model, before it kills it.
_KILLED_SECONDS = 30


def _longest_stop_seconds() -> int:
    return StopPolicy().longest_seconds + _KILLED_SECONDS


def _instructions() -> list[tuple[str, str]]:
    """Each instruction of the Dockerfile with what it says, without comments."""
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    found = [line.partition(" ") for line in lines if line.strip()]
    return [(name, rest.strip()) for name, _, rest in found]


def _said(name: str) -> list[str]:
    return [rest for instruction, rest in _instructions() if instruction == name]


def _environment() -> dict[str, str]:
    return dict(word.split("=", 1) for rest in _said("ENV") for word in shlex.split(rest))


def _copied() -> list[str]:
    """What is taken out of the checkout."""
    found = []
    for rest in _said("COPY"):
        if "--from" not in rest:
            *sources, _ = [word for word in rest.split() if not word.startswith("--")]
            found += sources
    return found


def _is_sent(path: str) -> bool:
    """Whether .dockerignore lets a path through; the last rule that fits counts."""
    is_sent = True
    parts = path.split("/")
    for rule in (CHECKOUT / ".dockerignore").read_text().splitlines():
        pattern = rule.removeprefix("!").removeprefix("**/")
        if rule.startswith("#") or not rule:
            continue
        leading = ["/".join(parts[: end + 1]) for end in range(len(parts))]
        named = parts if "**/" in rule else leading
        if any(fnmatch.fnmatch(one, pattern) for one in named):
            is_sent = rule.startswith("!")
    return is_sent


# --- the Dockerfile ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", _copied())
def test_what_the_image_is_made_of_is_there_and_is_sent(path: str) -> None:
    assert (CHECKOUT / path).exists()
    assert _is_sent(path)


@pytest.mark.parametrize(
    "path", [".git/config", "etc/docker/supervisord.password", "tests", ".venv"]
)
def test_what_is_none_of_the_images_business_is_not_sent(path: str) -> None:
    assert not _is_sent(path)


def test_all_that_the_package_is_built_from_is_copied() -> None:
    """Its folders, and the files that its description and its license name."""
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(CHECKOUT / "setup.cfg")
    folders = {one.split(".")[0] for one in setup["options"]["packages"].split()}
    named = {setup["metadata"]["license_files"]}
    named |= {setup["metadata"]["long_description"].removeprefix("file: ")}
    assert folders | named | {"templates", "etc", "pyproject.toml"} <= set(_copied())


def test_the_extras_that_are_installed_exist() -> None:
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(CHECKOUT / "setup.cfg")
    (extras,) = [rest for rest in _said("ARG") if rest.startswith("EXTRAS=")]
    assert set(extras.removeprefix("EXTRAS=").split(",")) <= set(setup["options.extras_require"])


def test_it_runs_as_a_user_who_owns_the_prefix() -> None:
    prefix = _environment()["SYNAPSE_PREFIX"]
    (run,) = [rest for rest in _said("RUN") if "useradd" in rest]
    assert re.search(rf"install .*--owner=synapse .*--mode=0700.* {prefix} {prefix}/etc ", run)
    assert _environment()["HF_HOME"] in run
    assert _said("USER") == ["synapse"]
    assert _said("VOLUME") == _said("WORKDIR") == [prefix]


def test_the_settings_that_are_laid_down_are_taken_and_are_private() -> None:
    target = f"{_environment()['SYNAPSE_PREFIX']}/etc/synapse.conf"
    (copy,) = [rest for rest in _said("COPY") if rest.endswith(target)]
    assert "--chown=synapse:synapse --chmod=0600 etc/docker/synapse.conf" in copy
    config.parse((DOCKER / "synapse.conf").read_text())


def test_a_stop_signals_the_init_which_hands_it_on_to_a_command_that_drains() -> None:
    (entry,), (command,) = _said("ENTRYPOINT"), _said("CMD")
    assert entry == '["tini", "--", "synapse"]'
    assert " tini " in " ".join(_said("RUN"))
    assert cli._parser().parse_args(yaml.safe_load(command)).run is cli._up
    assert _said("STOPSIGNAL") == ["SIGTERM"]


def test_the_health_check_asks_this_deployment() -> None:
    (check,) = _said("HEALTHCHECK")
    main_file = f"{_environment()['SYNAPSE_PREFIX']}/etc/supervisord.conf"
    assert f"CMD supervisorctl -c {main_file} models" in check


# --- compose -------------------------------------------------------------------------------------


def _services(path: Path) -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load(path.read_text())["services"]
    return services


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=lambda path: path.name)
def test_a_compose_file_names_files_and_arguments_that_exist(path: Path) -> None:
    whole = yaml.safe_load(path.read_text())
    known = {rest.partition("=")[0] for rest in _said("ARG")}
    for service in whole["services"].values():
        build = service.get("build", {})
        assert set(build.get("args", {})) <= known
        if "context" in build:
            assert (DOCKER / build["context"]).resolve() == CHECKOUT
            assert (CHECKOUT / build["dockerfile"]).is_file()
        for volume in service.get("volumes", []):
            source = volume.rpartition("}")[0] or volume.split(":")[0]
            is_known = source in whole.get("volumes", {}) or source.startswith("$")
            assert is_known or (DOCKER / source).is_file(), volume
        assert set(service.get("secrets", [])) <= set(whole.get("secrets", {}))


def test_a_variant_changes_the_service_that_there_is() -> None:
    whole = _services(DOCKER / "compose.yml")
    for name in ("compose.nvidia.yml", "compose.amd.yml"):
        assert set(_services(DOCKER / name)) <= set(whole)


def test_the_ports_that_are_published_are_those_of_the_settings() -> None:
    """On loopback of the host alone."""
    settings = config.parse((DOCKER / "synapse.conf").read_text())
    first, last = settings.first_port, settings.last_port
    assert settings.host == "0.0.0.0"  # noqa: S104 - of the container
    (port,) = _services(DOCKER / "compose.yml")["synapse"]["ports"]
    assert port == f"127.0.0.1:{first}-{last}:{first}-{last}"
    assert _said("EXPOSE") == [f"{first}-{last}"]


def test_a_container_has_the_time_that_a_drain_takes() -> None:
    period = _services(DOCKER / "compose.yml")["synapse"]["stop_grace_period"]
    assert int(period.removesuffix("s")) > _longest_stop_seconds()


def test_volumes_lie_where_the_image_looks() -> None:
    targets = {
        volume.rsplit(":", 1)[1]
        for volume in _services(DOCKER / "compose.yml")["synapse"]["volumes"]
    }
    assert targets == {_environment()["SYNAPSE_PREFIX"], _environment()["HF_HOME"]}


def test_the_back_end_reads_its_password_from_a_file_that_is_never_committed() -> None:
    whole = yaml.safe_load((DOCKER / "compose.backend.yml").read_text())
    backend, secret = whole["services"]["backend"], whole["secrets"]["supervisord"]["file"]
    (name,) = backend["secrets"]
    assert backend["environment"]["SYNAPSE_PASSWORD_FILE"] == f"/run/secrets/{name}"
    assert not any("PASSWORD" in key and "FILE" not in key for key in backend["environment"])
    ignored = (CHECKOUT / ".gitignore").read_text().split()
    assert any(fnmatch.fnmatch(f"etc/docker/{Path(secret).name}", one) for one in ignored)


# --- systemd and launchd -------------------------------------------------------------------------


def test_the_systemd_unit_drains_and_comes_back() -> None:
    unit = configparser.RawConfigParser(strict=True)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # keys keep their case
    unit.read(CHECKOUT / "etc" / "systemd" / "synapse.service")
    service = unit["Service"]
    assert cli._parser().parse_args(service["ExecStart"].split()[1:]).run is cli._up
    assert service["KillMode"] == "mixed"  # TERM to the main process alone
    assert int(service["TimeoutStopSec"]) > _longest_stop_seconds()
    assert service["Restart"] == "on-failure"


def test_the_launchd_agent_drains_and_comes_back() -> None:
    path = CHECKOUT / "etc" / "launchd" / "org.supervisor-synapse.plist"
    agent = plistlib.loads(path.read_bytes())
    assert agent["Label"] == path.stem
    assert cli._parser().parse_args(agent["ProgramArguments"][1:]).run is cli._up
    assert agent["ExitTimeOut"] > _longest_stop_seconds()
    assert agent["KeepAlive"]
    assert agent["RunAtLoad"]
