"""What a user installs: a wheel that carries its templates and needs no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
_INSTALL_SECONDS = 600


def _run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("PYTHON")
    } | {"HF_HOME": str(cwd / "hf")}
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False,
        timeout=_INSTALL_SECONDS, env=environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment, outside the checkout, with the built package."""
    root = tmp_path_factory.mktemp("elsewhere")
    source = root / "source"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(CHECKOUT, source, ignore=ignored)
    venv = root / "venv"
    made = _run(sys.executable, "-m", "venv", venv, cwd=root)
    assert made.returncode == 0, made.stderr
    pip = (venv / "bin" / "python", "-m", "pip", "--disable-pip-version-check")
    installed = _run(*pip, "install", "--quiet", source, cwd=root)
    assert installed.returncode == 0, installed.stderr
    shutil.rmtree(source)
    return venv


@pytest.fixture
def prefix(tmp_path: Path) -> Iterator[Path]:
    """Short, as a socket's path must be; other folders of tests may be too long."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="syn") as folder:
        yield Path(folder) / "p"


@pytest.mark.timeout(_INSTALL_SECONDS + 60)
def test_an_installed_package_lays_down_a_deployment_without_its_checkout(
    environment: Path, tmp_path: Path, prefix: Path
) -> None:
    done = _run(environment / "bin" / "synapse", "--prefix", prefix, "init", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    main = (prefix / "etc" / "supervisord.conf").read_text()
    assert f"command={environment}/bin/synapse --prefix {prefix} listen" in main
    assert (prefix / "etc" / "synapse.conf").read_text() == (
        CHECKOUT / "etc" / "synapse.conf"
    ).read_text()


def test_every_template_is_in_the_installed_package(environment: Path) -> None:
    inside = next(environment.glob("lib/python*/site-packages/supervisor_synapse/templates"))
    shipped = {path.name for path in (CHECKOUT / "templates").iterdir()}
    assert {path.name for path in inside.iterdir()} == shipped


def test_without_an_engine_it_says_how_to_get_one(
    environment: Path, tmp_path: Path, prefix: Path
) -> None:
    synapse = environment / "bin" / "synapse"
    assert _run(synapse, "--prefix", prefix, "init", cwd=tmp_path).returncode == 0
    done = _run("env", "PATH=/nowhere", synapse, "--prefix", prefix, "plan", cwd=tmp_path)
    assert done.returncode == 2
    assert "cannot find llama-server" in done.stderr
    assert "pip install" in done.stderr or "brew install" in done.stderr or "get one" in done.stderr
