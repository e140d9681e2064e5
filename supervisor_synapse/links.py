"""The links under var/models: safe names for files whose own paths may not stand in a block."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from supervisor_synapse import render
from supervisor_synapse.adapters import generations
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.core.model import Program, Variant
from supervisor_synapse.core.plan import Plan, with_rung


def reachable(
    plan: Plan, deployment: Deployment, earlier: Mapping[str, str]
) -> tuple[Plan, dict[Path, str]]:
    """The plan with paths that may stand in a block, and the links that this takes."""
    links: dict[Path, str] = {}
    found: dict[str, tuple[str, str | None]] = {}
    for program in plan.programs:
        own = program.ladder[0] if program.ladder else program
        found[program.key] = (
            _model_path(program.name, own, deployment.links, earlier.get(program.key), links),
            _projector_path(program.name, own, deployment.links, links),
        )
    programs = tuple(_at(program, found) for program in plan.programs)
    return replace(plan, programs=programs), links


def _at(program: Program, paths: Mapping[str, tuple[str, str | None]]) -> Program:
    """The program, on every rung, with files where `paths` says, by model key."""
    model_path, projector = paths[program.key]
    ladder = []
    for variant in program.ladder:
        its_path, its_projector = paths[variant.key]
        ladder.append(replace(variant, model_path=its_path, projector_path=its_projector))
    program = replace(
        program, model_path=model_path, projector_path=projector, ladder=tuple(ladder)
    )
    return with_rung(program, program.rung) if program.rung else program


def _projector_path(
    name: str, served: Program | Variant, folder: Path, links: dict[Path, str]
) -> str | None:
    projector = served.projector_path
    if projector is None or render.is_safe_path(projector):
        return projector
    link = folder / name / "mmproj.gguf"
    links[link] = projector
    return str(link)


def _model_path(
    name: str, served: Program | Variant, folder: Path, earlier: str | None, links: dict[Path, str]
) -> str:
    """The path to serve; the shards of a model must lie beside each other under their names."""
    path, shards = served.model_path, served.shards
    if earlier is not None and earlier != path and not shards:
        # The same blob under a new revision is no reason to restart.
        with contextlib.suppress(OSError):
            if os.path.samefile(earlier, path):
                if Path(earlier).is_relative_to(folder):
                    links[Path(earlier)] = path
                return earlier
    if all(render.is_safe_path(one) for one in (path, *shards)):
        return path
    if not shards:
        link = folder / f"{name}.gguf"
        links[link] = path
        return str(link)
    names = [f"{name}-{i:05}-of-{len(shards):05}.gguf" for i in range(1, len(shards) + 1)]
    for shard_name, shard in zip(names, shards, strict=True):
        links[folder / name / shard_name] = shard
    return str(folder / name / names[0])


def kept_as_they_are(deployment: Deployment, meant: Plan, found: Plan) -> dict[Path, str]:
    """The links of programs that stay as they were, since their files could not be looked at."""
    names = {one.name for one in meant.programs if one.key not in found.choices}
    return {
        path: target
        for path, target in (current(deployment).items() if names else ())
        if path.stem in names or path.parent.name in names
    }


def current(deployment: Deployment) -> dict[Path, str]:
    """The links as they are: other rungs of a ladder than the deployed one need theirs, too."""
    found = (*deployment.links.glob("*"), *deployment.links.glob("*/*"))
    return {path: os.readlink(path) for path in found if path.is_symlink()}


def real_model_path(program: Program, links: Path) -> Path:
    """Where the file is meant to lie, though it may not be there now."""
    path = Path(program.model_path)
    if path.is_relative_to(links):
        with contextlib.suppress(OSError):
            return Path(os.readlink(path))
    return path


def make(deployment: Deployment, links: Mapping[Path, str]) -> None:
    """Point each link at its file, atomically; one that is right already is not touched."""
    for link, target in links.items():
        with contextlib.suppress(OSError):
            if os.readlink(link) == target:
                continue
        link.parent.mkdir(mode=0o700, exist_ok=True)
        temporary = link.with_name(f".{link.name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, link)


def drop_unused(deployment: Deployment, links: Mapping[Path, str]) -> None:
    """Remove links that no block needs, nor one that may be gone back to; nothing but links is
    ever removed there.
    """
    in_use = "\n".join(
        path.read_text(errors="replace") for path in deployment.blocks.glob("*.conf")
    )
    for path in (*deployment.links.glob("*"), *deployment.links.glob("*/*")):
        is_unused = path.is_symlink() and path not in links and str(path) not in in_use
        if is_unused and not generations.mention(deployment, str(path)):
            path.unlink(missing_ok=True)
    for folder in deployment.links.iterdir():
        if folder.is_dir() and not folder.is_symlink():
            with contextlib.suppress(OSError):  # not empty: still needed
                folder.rmdir()
