"""Where a deployment stands, what is laid down, and what is refused."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from supervisor_synapse.adapters import deployment as deployments
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.errors import ConfigError
from tests.unit.test_store import full_disk, mode


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    return Deployment(tmp_path / "prefix")


def files(deployment: Deployment) -> dict[Path, str]:
    """What `synapse init` would write."""
    return {deployment.main_config: "[supervisord]\n", deployment.settings: "[synapse]\n"}


def contents(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    """Mode, and content of a file, of everything below `folder`."""
    return {
        str(path.relative_to(folder)): (mode(path), path.read_bytes() if path.is_file() else None)
        for path in folder.rglob("*")
    }


# --- choosing a prefix ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "environment", "chosen"),
    [
        ("/srv/a", "/srv/b", "/srv/a"), (None, "/srv/b", "/srv/b"), (None, "", "/home/me/.synapse"),
        (None, None, "/home/me/.synapse"), ("", "/srv/b", "/srv/b"), ("~/x", None, "/home/me/x"),
        ("/srv/./a//b/../c/", None, "/srv/a/c"), ("/srv/My Models", None, "/srv/My Models"),
    ],
)  # fmt: skip
def test_a_prefix_is_the_one_given_else_that_of_the_environment_else_in_the_home(
    monkeypatch: pytest.MonkeyPatch, given: str | None, environment: str | None, chosen: str
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("SYNAPSE_PREFIX", raising=False)
    if environment is not None:
        monkeypatch.setenv("SYNAPSE_PREFIX", environment)
    assert deployments.choose(given).prefix == Path(chosen)


def test_a_relative_prefix_is_made_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder for tests may be too long for a socket."""
    monkeypatch.chdir("/tmp")
    assert deployments.choose("here").prefix == Path.cwd() / "here"


@pytest.mark.parametrize(
    "prefix",
    [
        "/", "/srv/a;b", "/srv/a #b", "/srv/a%b", "/srv/%(here)s", "/srv/a\nb", "/srv/a\rb",
        "/srv/a]b", "/srv/'a'", '/srv/"a"', "/srv/é", "/srv/\udcff", "/srv/a  b", "/srv/a\\b",
        "/srv/a\tb", "/srv/a\x00b", "/srv/$a", "/srv/a*", "/srv/a\u2028b",
    ],
)  # fmt: skip
def test_a_prefix_that_supervisord_would_not_take_as_it_is_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigError, match="--prefix") as caught:
        deployments.choose(prefix)
    assert str(caught.value).isascii()
    assert "\n" not in str(caught.value)


def test_a_prefix_in_the_home_of_nobody_is_refused() -> None:
    with pytest.raises(ConfigError, match="no-such-user"):
        deployments.choose("~no-such-user/synapse")


def test_a_prefix_too_long_for_a_socket_is_refused() -> None:
    """supervisord binds `supervisor.sock.<pid>` first: 104 bytes are all there is on macOS."""
    fits = "/" + "a" * (91 - len("/var/run/supervisor.sock"))
    assert len(str(deployments.choose(fits).socket)) == 92
    with pytest.raises(ConfigError, match=r"supervisor\.sock is longer"):
        deployments.choose(fits + "a")


def test_everything_stands_below_the_prefix(deployment: Deployment) -> None:
    paths = [getattr(deployment, name) for name in dir(deployment) if not name.startswith("_")]
    found = [path for path in paths if isinstance(path, Path)]
    found += [*deployment.folders(), deployment.block("a"), deployment.log_file("a")]
    assert len(found) > 20
    assert all(path.is_relative_to(deployment.prefix) for path in found)


@pytest.mark.parametrize("command", [deployments.own_command, deployments.launcher_command])
def test_our_own_commands_can_be_run(command: object) -> None:
    assert callable(command)
    assert os.access(command()[0], os.X_OK)


# --- laying down ---------------------------------------------------------------------------------


def test_a_deployment_is_its_owners_alone(deployment: Deployment) -> None:
    before = os.umask(0)
    try:
        written = deployments.lay_down(deployment, files(deployment))
    finally:
        os.umask(before)
    assert set(written) == {deployment.main_config, deployment.settings}
    assert all(path.is_dir() for path in deployment.folders())
    modes = {path: mode(path) for path in (deployment.prefix, *deployment.prefix.rglob("*"))}
    assert {m for path, m in modes.items() if path.is_dir()} == {0o700}
    assert {m for path, m in modes.items() if path.is_file()} == {0o600}


def test_outer_folders_of_the_prefix_are_made_too(tmp_path: Path) -> None:
    deployments.lay_down(Deployment(tmp_path / "a" / "b" / "c"), {})
    assert (tmp_path / "a" / "b" / "c" / "etc" / "conf.d").is_dir()


def test_laying_down_again_changes_nothing(deployment: Deployment) -> None:
    deployments.lay_down(deployment, files(deployment))
    deployment.settings.write_text("[synapse]\nenable = none\n")
    before = contents(deployment.prefix)
    assert deployments.lay_down(deployment, files(deployment)) == ()
    assert contents(deployment.prefix) == before


def test_only_what_is_missing_is_written(deployment: Deployment) -> None:
    deployments.lay_down(deployment, files(deployment))
    deployment.settings.unlink()
    assert deployments.lay_down(deployment, files(deployment)) == (deployment.settings,)


def test_a_full_disk_leaves_no_half_written_file(deployment: Deployment) -> None:
    """It would never be overwritten, and supervisord would go on reading it."""
    text = "[supervisord]\n" * 100
    with full_disk(), pytest.raises(ConfigError, match="cannot write below"):
        deployments.lay_down(deployment, {deployment.main_config: text})
    deployments.lay_down(deployment, {deployment.main_config: text})
    assert deployment.main_config.read_text() == text


def test_a_file_in_the_place_of_a_folder_is_named(deployment: Deployment) -> None:
    deployment.prefix.mkdir()
    deployment.etc.write_text("")
    with pytest.raises(ConfigError) as caught:
        deployments.lay_down(deployment, {})
    assert str(deployment.etc) in str(caught.value)
    assert "--prefix" in str(caught.value)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_prefix_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="locked"):
        deployments.lay_down(Deployment(tmp_path / "locked" / "prefix"), {})


# --- what others may write ----------------------------------------------------------------------


def sensitive(deployment: Deployment) -> dict[str, Path]:
    """Everything from which programs are started."""
    return {
        "prefix": deployment.prefix, "etc": deployment.etc, "conf.d": deployment.blocks,
        "templates": deployment.templates, "main file": deployment.main_config,
        "settings": deployment.settings, "a block": deployment.block("a"),
        "a template": deployment.templates / "program.conf.j2", "links": deployment.links,
        "var/lib": deployment.lib, "var/run": deployment.run,
    }  # fmt: skip


@pytest.fixture
def laid_down(deployment: Deployment) -> Deployment:
    deployments.lay_down(deployment, files(deployment))
    for path in (deployment.block("a"), deployment.templates / "program.conf.j2"):
        path.write_text("")
        path.chmod(0o600)
    return deployment


@pytest.mark.parametrize("bit", [stat.S_IWGRP, stat.S_IWOTH])
@pytest.mark.parametrize("which", sensitive(Deployment(Path("/"))))
def test_what_others_may_write_is_refused_with_the_command_that_mends_it(
    laid_down: Deployment, which: str, bit: int
) -> None:
    deployments.require_laid_down(laid_down)
    path = sensitive(laid_down)[which]
    path.chmod(mode(path) | bit)
    for refuse in (
        lambda: deployments.require_laid_down(laid_down),
        lambda: deployments.lay_down(laid_down, {}),
    ):
        with pytest.raises(ConfigError) as caught:
            refuse()
        (line,) = caught.value.problems
        assert line.startswith(f"{path}: ")
        assert line.endswith(f"chmod go-w {path}")


def test_all_that_others_may_write_is_named_at_once(laid_down: Deployment) -> None:
    for path in (laid_down.blocks, laid_down.settings):
        path.chmod(0o777)
    with pytest.raises(ConfigError) as caught:
        deployments.require_laid_down(laid_down)
    assert len(caught.value.problems) == 2


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_what_belongs_to_someone_else_is_refused(laid_down: Deployment) -> None:
    os.chown(laid_down.block("a"), 12345, -1)
    with pytest.raises(ConfigError, match="belongs to user 12345"):
        deployments.require_laid_down(laid_down)


def test_what_others_may_write_behind_a_link_is_refused(
    laid_down: Deployment, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere.conf"
    elsewhere.write_text("")
    elsewhere.chmod(0o666)
    (laid_down.blocks / "b.conf").symlink_to(elsewhere)
    with pytest.raises(ConfigError, match=r"b\.conf"):
        deployments.require_laid_down(laid_down)


def test_nothing_laid_down_is_an_error_that_names_the_command(deployment: Deployment) -> None:
    with pytest.raises(ConfigError, match="synapse init"):
        deployments.require_laid_down(deployment)
