"""The command `synapse`. Parses, calls, prints; exit status 0 success, 1 failure, 2 bad usage.

Imports of what a command needs stand in the command: `synapse listen` must not pay for tables.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supervisor_synapse.adapters import deployment as deployments
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.errors import ApplyError, ConfigError, SynapseError
from supervisor_synapse.version import VERSION

_REFUSED_LISTENER_SECONDS = 4.0
_MOST_OVERTAKEN = 5

if TYPE_CHECKING:
    from supervisor_synapse.adapters.supervisord import Supervisord
    from supervisor_synapse.core.model import Failure, Problem, Program, Row
    from supervisor_synapse.core.settings import Settings
    from supervisor_synapse.discovery import Discovery
    from supervisor_synapse.effects import Deployer
    from supervisor_synapse.lifecycle import Interrupts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command."""
    os.umask(0o077)  # what we write is the user's alone
    _have_outputs()
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.run(deployments.choose(parsed.prefix), parsed))
    except ConfigError as error:
        for problem in error.problems:
            print(f"synapse: {problem}", file=sys.stderr)
        return 2
    except SynapseError as error:
        print(f"synapse: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `synapse plan | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, a folder that may not be entered
        where = f" {str(error.filename)!a}" if error.filename else ""
        print(
            f"synapse: cannot use{where or ' a file'}: {error.strerror or type(error).__name__}; "
            "free disk space, or mend the permissions",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        return 130


def _have_outputs() -> None:
    """Started with stdout or stderr closed, what is said goes nowhere, not to the other one."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - till the end


_ABOUT = """\
Turns the GGUF models on this machine into a fleet of llama.cpp servers, run by supervisord: finds
them, starts those that fit in memory, heals what fails, and goes back to what worked.
"""

_EXAMPLES = """\
examples:
  synapse up                             find models, start them, show where they answer
  synapse up --detach                    the same, and leave them running
  synapse pull ggml-org/gemma-3-4b-it-GGUF:Q4_K_M
                                         download a model; then: synapse discover
  synapse discover --dry-run             what an edit of etc/synapse.conf would change
  synapse doctor                         what is wrong, and how to mend it
  synapse rollback MODEL                 back to the last good block of a model
  synapse down                           stop everything, and verify it
  supervisorctl -c ~/.synapse/etc/supervisord.conf models
                                         the fleet: phase, port, memory, and why

files, below the prefix:
  etc/synapse.conf                       your settings; after an edit: synapse discover
  etc/conf.d/MODEL.conf                  one program each; after an edit: supervisorctl update
  etc/supervisord.conf                   supervisord's own file
  var/log/                               logs, and history.jsonl: each change of phase, and why

environment:
  SYNAPSE_PREFIX                         the deployment, where --prefix does not say
  HF_HOME, HF_HUB_CACHE                  where the Hugging Face cache lies
  HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE  which hub is asked, as whom, and whether at all

exit status: 0 success, 1 failure, 2 bad usage or configuration, 130 interrupted
"""

# What --help of a command says beside its summary.
_DETAILS = {
    "init": """\
Makes the folders of the deployment, etc/supervisord.conf and etc/synapse.conf. What is there
already stays as it is.
""",
    "up": """\
Lays the deployment down where it is missing, discovers models, starts supervisord, and shows
progress until every enabled model is ready or has failed. Where there is no model, a small one is
generated, so that the first try answers. In the foreground Ctrl-C stops everything.
""",
    "down": """\
Lets running requests finish (drain_seconds), stops all models and supervisord, and looks whether
any process is left; a second Ctrl-C cuts short. Exit status 1 where something is left, and it is
named.
""",
    "discover": """\
Looks through the Hugging Face cache and model_dirs, plans ports, context and memory, renders one
block a model, has each checked, and applies what changed. A model that did not change keeps its
process; changed ones are taken out one at a time and are on trial. Exit status 1 where a change was
refused or taken back.
""",
    "rollback": """\
Puts a former block of a model in place again, one that was good, and has it taken up. `synapse
generations MODEL` shows which there are.
""",
    "generations": """\
What was applied, oldest first: when, by which way, why, and whether it proved itself. With MODEL
only what concerned it.
""",
    "plan": """\
What would be started, in which waves, on which device, with how much memory and from where that
figure comes; and what would not, and why. Nothing is changed.
""",
    "doctor": """\
Looks at the engine, caches and disks, ports, devices and their readers, permissions, keys, the web
server, supervisord and what it runs, settings, blocks and state. Says what is wrong, the worst
first, each with how to mend it. Changes nothing, and works while nothing runs. Exit status 1 where
there is an error; warnings and notes do not count.
""",
    "pull": """\
Downloads one quantization of a repo: all its parts, and the projector where there is one. Without
QUANT it is Q4_K_M, else what is near it. Says before how large it is, what else there is, and
whether disk and memory hold it; only the disk can refuse. A download that was interrupted goes on
where it stopped. QUANT may also be the name of a file.
""",
    "listen": "Observes, decides and acts; supervisord runs it as [eventlistener:synapse].\n",
}

_Command = Callable[[str, Any, str], argparse.ArgumentParser]


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="synapse", description=_ABOUT, epilog=_EXAMPLES, formatter_class=raw
    )
    parser.add_argument("--version", action="version", version=f"synapse {VERSION}")
    _add_prefix(parser, default=None)
    commands = parser.add_subparsers(
        required=True, title="commands", metavar="COMMAND",
        description="`synapse COMMAND --help` says more of each.",
    )  # fmt: skip

    def command(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        said = f"{summary}\n\n{_DETAILS[name]}"
        sub = commands.add_parser(name, help=summary, description=said, formatter_class=raw)
        sub.set_defaults(run=run)
        # Where it is not said here, what was said before the command holds.
        _add_prefix(sub, default=argparse.SUPPRESS)
        return sub

    _add_fleet(command)
    _add_changes(command)
    _add_care(command)
    command("listen", _listen, "The event listener; run by supervisord.")
    return parser


def _add_fleet(command: _Command) -> None:
    command("init", _init, "Lay down etc/ and var/; nothing is overwritten.")
    up = command("up", _up, "Find models, start them, and show where they answer.")
    up.add_argument("--detach", action="store_true", help="leave them running in the background")
    up.add_argument(
        "--demo", action="store_true", help="generate and serve a small demonstration model"
    )
    command("down", _down, "Stop everything and verify that nothing is left.")


def _add_changes(command: _Command) -> None:
    discover = command("discover", _discover, "Look for models; render, check and apply.")
    discover.add_argument("--dry-run", action="store_true", help="show what would change")
    _add_json(discover)
    discover.add_argument(
        "--force", action="append", default=[], metavar="MODEL",
        help="overwrite the hand-edited block of MODEL; may be given several times",
    )  # fmt: skip
    rollback = command("rollback", _rollback, "Put a former good block of a model in place again.")
    rollback.add_argument("model", metavar="MODEL", help="its name, as `synapse plan` shows it")
    rollback.add_argument(
        "--to", type=_generation_number, default=0, metavar="GENERATION",
        help="which one (`synapse generations MODEL`); default: the last good one",
    )  # fmt: skip
    listing = command("generations", _generations, "Show what was applied, when, and how it went.")
    listing.add_argument("model", metavar="MODEL", nargs="?", help="default: all models")
    _add_json(listing)
    _add_json(
        command("plan", _plan, "Show what would start, where, with how much memory, and why.")
    )


def _add_care(command: _Command) -> None:
    pull = command("pull", _pull, "Download a model from the Hugging Face hub into the cache.")
    pull.add_argument(
        "what", metavar="REPO[:QUANT]", help="OWNER/NAME, and which quantization of it"
    )
    doctor = command("doctor", _doctor, "Look for what is wrong, and say how to mend it.")
    _add_json(doctor)
    doctor.add_argument(
        "--deep", action="store_true",
        help="also compare the content of models with their checksums: reads all of each",
    )  # fmt: skip
    doctor.add_argument(
        "--verbose", action="store_true", help="show also what is well, and all versions"
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="JSON on stdout, for programs")


def _add_prefix(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument(
        "--prefix", metavar="DIR", default=default,
        help="the deployment (default: $SYNAPSE_PREFIX, else ~/.synapse)",
    )  # fmt: skip


def _init(deployment: Deployment, _: argparse.Namespace) -> int:
    from supervisor_synapse import deploy

    written = deploy.initialize(deployment)
    for path in written:
        print(f"wrote {path}")
    if not written:
        print(f"{deployment.prefix} is laid down already; nothing was changed")
    return 0


def _discover(deployment: Deployment, arguments: argparse.Namespace) -> int:
    from supervisor_synapse import discovery, lifecycle

    failed: tuple[str, ...] = ()
    if arguments.dry_run:
        rpc = lifecycle.connect(deployment)
        found = discovery.discover(deployment, _settings(deployment), rpc, arguments.force)
        _require_known(arguments.force, found)
        if not arguments.json:
            _show_discovery(deployment, found)
            _show_restarts(found, rpc)
    else:
        found, failed = _discover_and_apply(deployment, arguments.force, show=not arguments.json)
    if arguments.json:
        print(json.dumps(_discovery_json(found, dry_run=arguments.dry_run), indent=2))
    return int(bool(failed))


def _discover_and_apply(
    deployment: Deployment, forced: Sequence[str], *, show: bool
) -> tuple[Discovery, tuple[str, ...]]:
    """What was found and applied, and the models whose changes failed."""
    from supervisor_synapse import deploy, discovery, lifecycle

    settings = _settings(deployment)
    rpc = lifecycle.connect(deployment)

    def look() -> Discovery:
        found = discovery.discover(deployment, settings, rpc, forced)
        _require_known(forced, found)
        if show:
            _show_discovery(deployment, found)
        return found

    return _applied(look, partial(deploy.apply, deployment), rpc)


def _applied(
    look: Callable[[], Discovery],
    apply: Callable[[Discovery, Supervisord | None, Callable[[str], None]], tuple[str, ...]],
    rpc: Supervisord | None,
) -> tuple[Discovery, tuple[str, ...]]:
    """Where the deployment changes meanwhile (the listener moves a port …), look again."""
    from supervisor_synapse import deploy

    for _ in range(_MOST_OVERTAKEN):
        found = look()
        with contextlib.suppress(deploy.Overtaken):
            return found, apply(found, rpc, _say)
    raise ApplyError("the deployment changes all the time; run `synapse discover` again")


def _generation_number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!a} is no generation: a number from 1 on")
    return int(text)


def _rollback(deployment: Deployment, arguments: argparse.Namespace) -> int:
    from supervisor_synapse import lifecycle, rollback

    deployments.require_laid_down(deployment)
    rpc = lifecycle.connect(deployment)
    if rpc is None:
        print(rollback.roll_back(deployment, arguments.model, to=arguments.to))
        return 0
    answer = lifecycle.command(rpc, "rollback", arguments.model, arguments.to)
    if not answer.ok:
        raise ApplyError(answer.message)
    print(answer.message)
    return 0


def _generations(deployment: Deployment, arguments: argparse.Namespace) -> int:
    from supervisor_synapse import report
    from supervisor_synapse.adapters import generations, registry

    deployments.require_laid_down(deployment)
    newest = registry.load(deployment.registry).generation
    # One beyond that was written down, and never came about.
    found = tuple(one for one in generations.every(deployment) if one.number <= newest)
    standings = generations.standings(deployment)
    name = arguments.model
    if name is not None:
        found = tuple(one for one in found if name in (*one.added, *one.changed, *one.removed))
        if not found and name not in standings:
            raise ConfigError(f"{name}: there is no such model")
    if arguments.json:
        print(json.dumps(report.generations_json(found, standings), indent=2))
    elif found:
        print(report.generations_table(found, standings, name))
    else:
        print("Nothing was applied yet: `synapse discover` does.")
    return 0


def _require_known(names: Sequence[str], found: Discovery) -> None:
    unknown = sorted(set(names) - {program.name for program in found.plan.programs})
    if unknown:
        raise ConfigError([f"--force {name!a}: there is no such model" for name in unknown])


def _plan(deployment: Deployment, arguments: argparse.Namespace) -> int:
    from supervisor_synapse import discovery, lifecycle

    settings = _settings(deployment)
    found = discovery.discover(deployment, settings, lifecycle.connect(deployment))
    waves = found.plan.waves(settings.max_parallel)
    if arguments.json:
        print(json.dumps(_plan_json(found, waves), indent=2))
        return 0
    from supervisor_synapse import report

    _show_problems(found.problems)
    print(report.devices_table(found.devices))
    print()
    others = [program for program in found.plan.programs if not program.enabled]
    if found.plan.programs:
        print(report.plan_table(waves, others))
    else:
        print("No models were found.")
    return 0


def _doctor(deployment: Deployment, arguments: argparse.Namespace) -> int:
    from supervisor_synapse import doctor, report

    found = doctor.examine(deployment, deep=_show_read if arguments.deep else None)
    if arguments.json:
        print(json.dumps(report.examination_json(found), indent=2))
    else:
        print(report.examination_text(found, verbose=arguments.verbose))
    return int(not found.is_well)


def _show_read(done: int, total: int) -> None:
    """One line in a terminal, drawn over and over; wiped at the end."""
    if sys.stderr.isatty():
        line = f"comparing checksums: {100 * done // max(total, 1)} %" if done < total else ""
        print(f"\r{line:<40}\r{line}", end="", file=sys.stderr, flush=True)


def _pull(deployment: Deployment, arguments: argparse.Namespace) -> int:
    from supervisor_synapse import config, pull

    os.environ.setdefault("TQDM_ASCII", " #")  # what bars are drawn with
    settings = config.load(deployment.settings)
    choice = pull.choose(arguments.what, settings)
    for line in pull.told(choice, pull.devices_of(settings), settings):
        _say(line)
    pull.require_room(choice)
    try:
        pull.bring(choice, _say)
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on where it stopped")
        return 130
    following = "discover" if deployment.main_config.exists() else "up"
    print(f"{arguments.what} is in {choice.cache}. To serve it: `synapse {following}`")
    return 0


def _up(deployment: Deployment, arguments: argparse.Namespace) -> int:
    from supervisor_synapse import deploy, lifecycle, progress, rollback

    with lifecycle.Interrupts() as interrupts:
        for path in deploy.initialize(deployment):
            _say(f"wrote {path}")
        settings = _settings(deployment)
        rpc = lifecycle.connect(deployment)
        for line in rollback.set_broken_aside(deployment) if rpc is None else ():
            _say(line)
        started_here = rpc is None
        found, _ = _applied(
            partial(_find_or_make_models, deployment, settings, rpc, demo=arguments.demo),
            partial(deploy.apply, deployment, is_interrupted=lambda: interrupts.count > 0), rpc,
        )  # fmt: skip
        if rpc is None:
            rpc = lifecycle.start_supervisord(deployment)
        else:
            _say(f"supervisord runs already (pid {rpc.pid()})")
        expected = frozenset(program.name for program in found.plan.programs if program.enabled)
        unknown = lifecycle.unknown_to(rpc, expected)
        for name in sorted(unknown):
            _say(
                f"warning: supervisord does not know {name}: [include] in "
                f"{deployment.main_config} must name conf.d/*.conf"
            )
        expected -= unknown
        rows = progress.show_until_settled(rpc, interrupts, expected)
        if not interrupts.count:
            _show_ready(rows, deployment, _gateway_url(deployment, rpc, settings))
        if arguments.detach or not started_here:
            if not interrupts.count:
                return _verdict(rows) or int(bool(unknown))
            if not started_here:
                return 130
        else:
            _say("Ctrl-C stops everything.")
            progress.show_changes(rpc, interrupts, rows)
        return _stop_everything(deployment, settings, interrupts)


def _find_or_make_models(
    deployment: Deployment, settings: Settings, rpc: Supervisord | None, *, demo: bool
) -> Discovery:
    """What is there; where there is nothing, or `demo` is set, a small model is generated first."""
    from supervisor_synapse import discovery
    from supervisor_synapse.adapters import demo_model

    found = discovery.discover(deployment, settings, rpc, demo=demo)
    is_empty = not found.plan.programs and not found.registry.programs
    has_demo = any(program.repo == demo_model.REPO for program in found.plan.programs)
    if is_empty or (demo and not has_demo):
        path = discovery.generate_demo(settings)
        _say(
            f"No model was found, so a small one was generated for a first try: {path}\n"
            "A real one: `synapse pull REPO`, then `synapse discover`."
            if is_empty
            else f"A small demonstration model was generated: {path}"
        )
        found = discovery.discover(deployment, settings, rpc, demo=demo)
    _show_problems(found.problems)
    return found


def _gateway_url(deployment: Deployment, rpc: Supervisord, settings: Settings) -> str:
    """Where all models answer at one address; "" where they do not."""
    from supervisor_synapse.core.model import http_url
    from supervisor_synapse.errors import ShuttingDown, TransientError

    with contextlib.suppress(TransientError, ShuttingDown):
        # Somebody may have a program of that name, which is none of ours.
        if deployment.gateway_config.exists() and rpc.process("gateway") is not None:
            url = http_url(settings.gateway.host, settings.gateway.port)
            return url.replace("http:", "https:", 1) if settings.gateway.tls_certificate else url
    return ""


def _show_ready(rows: Sequence[Row], deployment: Deployment, gateway_url: str) -> None:
    from supervisor_synapse import report
    from supervisor_synapse.core.model import Phase

    shown = [row for row in rows if row.enabled or row.phase is not Phase.DISABLED]
    print(report.ready_table(shown or rows))
    hidden = len(rows) - len(shown)
    if shown and hidden:
        print(f"{hidden} more not enabled: `synapse plan` says why.")
    if any(row.phase in (Phase.BACKOFF, Phase.FAILED) for row in shown):
        print("`synapse doctor` says what is wrong, and how to mend it.")
    example = report.example(shown)
    if example is not None:
        print(f"\nTry it:\n  {report.curl_line(example)}\n")
    if gateway_url:
        print(f"All models at one address: {gateway_url}/v1")
    print(f"More: {_supervisorctl(deployment)} models", flush=True)


def _supervisorctl(deployment: Deployment) -> str:
    """How the user calls it from here: without a path where that would find the same one."""
    import shlex
    import shutil

    ours = Path(sys.executable).with_name("supervisorctl")
    found = shutil.which("supervisorctl")
    is_elsewhere = ours.exists() and not (found and os.path.samefile(found, ours))
    name = str(ours) if is_elsewhere else "supervisorctl"
    return shlex.join([name, "-c", str(deployment.main_config)])


def _verdict(rows: Sequence[Row]) -> int:
    from supervisor_synapse.core.model import Phase

    return int(any(row.enabled and row.phase is not Phase.READY for row in rows))


def _down(deployment: Deployment, _: argparse.Namespace) -> int:
    from supervisor_synapse import lifecycle

    with lifecycle.Interrupts() as interrupts:
        return _stop_everything(deployment, _settings_or_defaults(deployment), interrupts)


def _stop_everything(deployment: Deployment, settings: Settings, interrupts: Interrupts) -> int:
    from supervisor_synapse import lifecycle

    already = interrupts.count
    bound = settings.stop.longest_seconds + 30.0
    stopped = lifecycle.stop(deployment, bound, hurry=lambda: interrupts.count > already)
    if stopped is None:
        _say("nothing is running")
        return 0
    for process in stopped.left:
        print(f"synapse: still there: {process}", file=sys.stderr)
    if not stopped.left:
        _say(f"stopped: {stopped.processes} processes gone in {stopped.seconds:.1f} s")
    return int(bool(stopped.left))


def _listen(deployment: Deployment, _: argparse.Namespace) -> int:
    from supervisor_synapse import control
    from supervisor_synapse.adapters import processes

    try:
        deployments.require_laid_down(deployment)
    except ConfigError:
        processes.die_with_parent()
        time.sleep(_REFUSED_LISTENER_SECONDS)  # else supervisord would try again at once
        raise
    control.listen(deployment, _deployer(deployment))
    return 0


def _deployer(deployment: Deployment) -> Deployer:
    """What renders or plans is imported when it is called: that is seldom, and not small."""
    from supervisor_synapse import rollback
    from supervisor_synapse.effects import Deployer

    def revising(change: str) -> Any:
        def call(*arguments: Any) -> Any:
            from supervisor_synapse import revise

            return getattr(revise, change)(deployment, *arguments)

        return call

    def roll_back(name: str, left: str, failure: Failure) -> str:
        return rollback.roll_back(deployment, name, left=left, failure=failure)

    def roll_back_to(name: str, to: int, command: str) -> str:
        return rollback.roll_back(deployment, name, to=to, command=command)

    return Deployer(
        move_port=revising("move_port"), set_rung=revising("set_rung"), adopt=revising("adopt"),
        renew=partial(rollback.renew, deployment), bless=partial(rollback.bless, deployment),
        forget_untold=partial(rollback.told_of, deployment), roll_back=roll_back,
        roll_back_to=roll_back_to, set_aside=partial(rollback.set_aside, deployment),
    )  # fmt: skip


def _settings(deployment: Deployment) -> Settings:
    from supervisor_synapse import config

    deployments.require_laid_down(deployment)
    return config.load(deployment.settings)


def _settings_or_defaults(deployment: Deployment) -> Settings:
    """A broken synapse.conf must not keep anybody from stopping; what was applied counts."""
    from supervisor_synapse.adapters import registry

    return registry.load(deployment.registry).settings


def _say(line: str) -> None:
    """Words on the way; results go to stdout."""
    print(line, file=sys.stderr, flush=True)


def _show_problems(problems: Sequence[Problem]) -> None:
    for problem in problems:
        _say(f"warning: {problem}")


def _show_discovery(deployment: Deployment, found: Discovery) -> None:
    from supervisor_synapse import report

    _show_problems(found.problems)
    changes = found.changes
    for name in (*changes.added, *changes.changed, *changes.removed):
        path, block = deployment.block(name), found.blocks.get(name)
        before = path.read_text("utf-8", "replace") if path.exists() else None
        print(report.block_diff(name, before, block.text if block else None))
    count = len(found.plan.programs)
    if not changes:
        print(f"{count} model{'' if count == 1 else 's'}, nothing has changed", flush=True)


def _show_restarts(found: Discovery, rpc: Supervisord | None) -> None:
    """What an apply would do to processes."""
    if rpc is None or not found.changes:
        return
    up = {process.name for process in rpc.processes() if process.pid}
    stays = sorted(up & {*found.changes.unchanged, *found.changes.kept})
    for verb, names in (("restart", found.changes.changed), ("stop", found.changes.removed)):
        affected = [name for name in names if name in up]
        if affected:
            print(f"would {verb}: {', '.join(affected)}")
    print(f"would stay as they are: {len(stays)}", flush=True)


def _discovery_json(found: Discovery, *, dry_run: bool) -> dict[str, Any]:
    changes = found.changes
    return {
        "models": [_program_json(program) for program in found.plan.programs],
        "problems": _problems_json(found.problems),
        "changes": {name: list(getattr(changes, name)) for name in changes.__dataclass_fields__},
        "generation": found.registry.generation,
        "dry_run": dry_run,
    }


def _plan_json(found: Discovery, waves: list[list[Program]]) -> dict[str, Any]:
    return {
        "waves": [[program.name for program in wave] for wave in waves],
        "models": [_program_json(program) for program in found.plan.programs],
        "devices": [
            {"name": device.name, "total": device.total_bytes, "free": device.free_bytes}
            for device in found.devices
        ],
        "engine": {"path": found.engine.path, "version": found.engine.version},
        "problems": _problems_json(found.problems),
    }


def _program_json(program: Program) -> dict[str, Any]:
    return {
        "name": program.name,
        "repo": program.repo,
        "file": program.file,
        "path": program.model_path,
        "shards": list(program.shards),
        "projector": program.projector_path,
        "tier": program.tier.label,
        "role": program.role.value,
        "quantization": program.quantization,
        "parameters": program.parameters,
        "size": program.size_bytes,
        "enabled": program.enabled,
        "reason": program.reason,
        "port": program.port,
        "url": program.url,
        "alias": program.alias,
        "context": program.context,
        "parallel": program.parallel,
        "device": program.device,
        "memory": _memory_json(program),
        "rung": program.rung,
        "ladder": [variant.label for variant in program.ladder],
        "arguments": list(program.arguments),
    }


def _memory_json(program: Program) -> dict[str, Any]:
    return {
        "estimated": program.estimate_bytes,
        "source": program.estimate_source,
        "devices": {part.device: part.total_bytes for part in program.estimate.parts},
    }


def _problems_json(problems: Sequence[Problem]) -> list[dict[str, str]]:
    return [
        {"subject": problem.subject, "reason": problem.reason, "remedy": problem.remedy}
        for problem in problems
    ]


if __name__ == "__main__":
    sys.exit(main())
