"""The command `synapse`: how it is called, and what it says on the way."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisor_synapse import cli
from supervisor_synapse.adapters import demo_model
from supervisor_synapse.core.model import Problem
from tests.conftest import Engine
from tests.gguf_factory import write_model
from tests.integration.harness import deployed
from tests.unit.builders import FLAGS

CHECKOUT = Path(__file__).resolve().parents[2]


def status_of(*words: str | Path) -> int:
    """The exit status, also where argparse ends the process."""
    try:
        return cli.main([str(word) for word in words])
    except SystemExit as end:
        return int(str(end.code))


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short one, for a socket; the mask that a command sets for its process is put back."""
    mask = os.umask(0o077)
    with tempfile.TemporaryDirectory(prefix="syn", dir="/tmp") as path:
        yield Path(path)
    os.umask(mask)


@pytest.fixture
def prefix(folder: Path) -> Path:
    """A deployment with one model and an engine that can only say what it knows."""
    engine = folder / "llama-server"
    engine.write_text(f"#!/bin/sh\necho 'version: 1'\necho '{' '.join(sorted(FLAGS))}'\n")
    engine.chmod(0o700)
    (folder / "models").mkdir()
    write_model(folder / "models" / "a.gguf")
    (folder / "hub").mkdir()
    made = folder / "prefix"
    assert status_of("init", "--prefix", made) == 0
    (made / "etc" / "synapse.conf").write_text(
        f"[synapse]\nengine = {engine}\ncache_dirs = {folder}/hub\nmodel_dirs = {folder}/models\n"
    )
    return made


# --- how it is called ----------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("--prefix", "P", "init"), ("init", "--prefix", "P"),
                                   ("--prefix", "other", "init", "--prefix=P")])  # fmt: skip
def test_the_deployment_may_be_named_before_and_after_the_command(
    words: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it wins, being the more particular."""
    monkeypatch.setenv("SYNAPSE_PREFIX", str(folder / "environment"))
    monkeypatch.chdir(folder)
    assert status_of(*words) == 0
    assert [path.name for path in folder.iterdir()] == ["P"]


def test_where_no_deployment_is_named_the_environment_says_which(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNAPSE_PREFIX", str(folder / "environment"))
    assert status_of("init") == 0
    assert (folder / "environment" / "etc").is_dir()


def _texts() -> Iterator[tuple[str, str]]:
    """All that may be shown: each text in the code, and each line of what is shipped."""
    for path in sorted(CHECKOUT.glob("supervisor_synapse/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield path.name, node.value
    for path in (CHECKOUT / "README.md", *CHECKOUT.glob("templates/*"), *CHECKOUT.glob("etc/*.*")):
        for line in path.read_text().splitlines():
            yield path.name, line


def test_each_command_that_is_recommended_exists(capsys: pytest.CaptureFixture[str]) -> None:
    """A remedy that cannot be carried out is worse than none."""
    named = {
        (word, where)
        for where, text in _texts()
        for word in re.findall(r"(?:`|^|\$ )synapse ([a-z]+)\b", text)
    }
    assert len(named) > 5
    unknown = sorted(named_in for named_in in named if status_of(named_in[0], "--help") != 0)
    assert unknown == []


def test_a_problem_says_how_to_mend_it_in_words() -> None:
    """No bracket after a bracket."""
    assert str(Problem("x", "is cut (7 bytes)", "remove it")) == (
        "x: is cut (7 bytes); to mend it: remove it"
    )
    assert str(Problem("x", "is cut")) == "x: is cut"


def test_a_section_that_matches_no_model_is_warned_of(
    prefix: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (prefix / "etc" / "synapse.conf").open("a") as conf:
        conf.write("[model:a]\nparallel = 2\n[model:qwen*]\nparallel = 2\n")
    for command in ("plan", "discover"):
        capsys.readouterr()
        assert status_of("--prefix", prefix, command) == 0
        warnings = [line for line in capsys.readouterr().err.splitlines() if "[model:" in line]
        assert [line.partition(";")[0] for line in warnings] == [
            "warning: [model:qwen*]: matches no model"
        ]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_run_says_what_takes_so_long(tmp_path: Path) -> None:
    """pip is told to be quiet."""
    command = ["make", "--dry-run", "run", f"VENV={tmp_path}/venv"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    (pip,) = (index for index, line in enumerate(lines) if " pip install" in line)
    assert lines[pip - 1].startswith('echo "Installing ')


# --- a first try ---------------------------------------------------------------------------------


def test_the_demo_is_served_beside_other_models_when_it_is_asked_for(
    llama_server: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    """Generated, up, tried first or not; told once; and gone with its folder."""
    with deployed() as deployment:
        own = write_model(deployment.sources / "own.gguf")
        deployment.hub.add("acme/own", {"own-f16.gguf": own})
        deployment.synapse("up", "--detach")
        assert list(deployment.models()) == ["own-f16"]
        demo = deployment.synapse("up", "--demo", "--detach")
        assert "demonstration model was generated" in demo.text
        models = deployment.models()
        assert {name: model["phase"] for name, model in models.items()} == {
            "own-f16": "ready", "demo-f16": "ready",
        }  # fmt: skip
        assert models["demo-f16"]["repo"] == demo_model.REPO
        assert "generated" not in deployment.synapse("up", "--demo", "--detach").text
        shutil.rmtree(deployment.hub.repo(demo_model.REPO))
        assert deployment.discover()["changes"]["removed"] == ["demo-f16"]
        assert list(deployment.log.glob("synapse-std*")) == []
        assert deployment.down().status == 0
