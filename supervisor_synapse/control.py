"""The listener's loop: observe, decide, act, publish. The sole owner of changing state.

Events only wake the loop; each turn reads the whole truth from supervisord and the servers. What
waits for others runs on threads, so that the loop never blocks and stdin is always read. What is
remembered is written down at each change, so that whoever comes after a killed listener carries
on; a disk that does not take it costs only that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from supervisor_synapse import effects
from supervisor_synapse.adapters import history, processes, registry, states, store
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.adapters.events import Connection, Event
from supervisor_synapse.adapters.registry import Registry
from supervisor_synapse.adapters.supervisord import Process, Supervisord
from supervisor_synapse.blocks import Blocks, Sight
from supervisor_synapse.commands import Answer, Commands
from supervisor_synapse.core import failover
from supervisor_synapse.core.admission import Ledger
from supervisor_synapse.core.decide import decide, is_at_rest_by_hand
from supervisor_synapse.core.gateway import verdict
from supervisor_synapse.core.model import (
    UNDER_WAY,
    Breaker,
    DeviceRow,
    Estimate,
    Failure,
    ListenerRow,
    Phase,
    ProcessState,
    Program,
    Row,
    Snapshot,
    Usage,
)
from supervisor_synapse.core.overview import device_rows
from supervisor_synapse.core.restarts import Restarts
from supervisor_synapse.core.state import (
    Action,
    Decision,
    ModelState,
    Now,
    Policy,
    Renew,
    RollBack,
    Seen,
    SetRung,
    Stop,
    Transition,
)
from supervisor_synapse.core.trials import Standing, Standings
from supervisor_synapse.errors import ShuttingDown, TransientError
from supervisor_synapse.gateway import PROGRAM, Gateway, View
from supervisor_synapse.memory import Memory, Run
from supervisor_synapse.notify import Notifier
from supervisor_synapse.observe import Observer, Wanted, Watched, planned, slots_busy, usage
from supervisor_synapse.version import VERSION

_RPC_TIMEOUT_SECONDS = 5.0
_IDLE_TICK_SECONDS = 1.0
_LONGEST_IDLE_TICK_SECONDS = 2.0
_IDLE_SHARE = 0.01  # of the time goes into turns while nothing is on its way
_BUSY_TICK_SECONDS = 0.1  # while something is on its way
_ENDING_TICK_SECONDS = 0.03  # while a process ends: a swap waits for that
_SHORTEST_TICK_SECONDS = 0.02
_BLIND_SECONDS = 5.0  # a turn that took longer saw too little to judge by
_BEAT_SECONDS = 1.5  # the plugin hears from us at least so often
_FIGURES_SECONDS = 5.0  # figures that move all the time are handed over so often
_MOST_LINES = 500  # of the history, handed to the plugin
_LAST_WRITE_SECONDS = 2.0
_REPEAT_SECONDS = 60.0  # between two complaints about the same file
_ABSENT_SECONDS = 5.0  # so long a model that supervisord does not have is still shown

_UNKNOWN = Standing()
_NOBODY = Wanted(False, "there is no such model")
_ENDING = frozenset({Phase.STOPPING, Phase.VERIFYING})

_log = logging.getLogger("synapse")

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Published:
    """What the plugin has."""

    rows: tuple[Row, ...] | None = None
    devices: tuple[DeviceRow, ...] = ()
    at: float = 0.0  # monotonic
    heard_at: float = 0.0  # of us, also if only that nothing has changed


@dataclass(slots=True)
class _World:
    """The registry as last read."""

    registry: Registry = field(default_factory=Registry)
    stamp: tuple[int, int] = (0, 0)  # of the file: mtime and inode


class Listener:
    """Brings enabled models up, heals what fails, and tells what is. One in each supervisord."""

    def __init__(
        self,
        deployment: Deployment,
        deployer: effects.Deployer,
        stdin: int = 0,
        stdout: int = 1,
    ) -> None:
        self._deployment = deployment
        self._stdin, self._stdout = stdin, stdout
        self._rpc = Supervisord(deployment.socket, _RPC_TIMEOUT_SECONDS)
        self._rpc_thread = ThreadPoolExecutor(1, "rpc")
        self._disk_thread = ThreadPoolExecutor(1, "disk")
        self._effects = effects.Effects(self._rpc, os.getppid(), deployer)
        self._wake = asyncio.Event()
        self._observer = Observer(self._wake.set)
        self._memory = Memory(deployment)
        self._gateway = Gateway(deployment)
        self._gateway_process: Process | None = None
        self._notifier = Notifier(deployment)
        self._ledger = Ledger()
        self._end: str | None = None
        self._world = _World()
        self._boot = states.boot_id()
        self._states: Mapping[str, ModelState] = store.load_state(
            deployment.state, partial(states.load, boot=self._boot)
        )
        self._saved: Mapping[str, ModelState] = self._states
        self._saving: asyncio.Task[None] | None = None
        self._telling: set[asyncio.Task[None]] = set()  # lines on their way into the history
        self._blocks = Blocks(deployment, self._rpc, deployer)
        self._blocks_seen = Sight()
        self._commands = Commands(deployment, self._fits, deployer.roll_back_to)
        self._states = self._commands.take_up(failover.taken_up(self._states))
        self._published = _Published()
        self._untold: list[history.Line] = []  # lines of the history that the plugin has not got
        self._earlier: list[dict[str, object]] | None = None  # of before, for the plugin
        self._failures: dict[str, Counter[str]] = {}  # by model and class, since we began
        self._began_at = time.time()
        self._turn_seconds = self._lag_seconds = 0.0
        self._absent_since: dict[str, float] = {}
        self._has_requests = True  # perhaps, from before
        self._looked_at = time.monotonic()
        self._complained: dict[str, float] = {}
        self._hindered: dict[str, str] = {}  # why blocks could not be put in place, by model

    async def run(self) -> None:
        """Until supervisord ends or stops us."""
        stdin = open(self._stdin, "rb", buffering=0, closefd=False)  # noqa: ASYNC230, SIM115 - a pipe
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: Connection(self._stdout, self._on_event, self._on_end), stdin
        )
        _log.info("listening", extra={"prefix": str(self._deployment.prefix)})
        self._earlier = await self._to_disk(
            partial(history.recent, self._deployment.history, _MOST_LINES)
        )
        while self._end is None:
            self._wake.clear()
            begun = time.monotonic()
            await self._turn()
            ended, pause = time.monotonic(), self._pause()
            self._turn_seconds = ended - begun
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause)
            self._lag_seconds = max(time.monotonic() - ended - pause, 0.0)
        self._observer.close()
        self._memory.close()
        self._gateway.close()
        self._notifier.close()
        with contextlib.suppress(TimeoutError):  # what waits for the disk stands before this
            await asyncio.wait_for(self._to_disk(lambda: None), _LAST_WRITE_SECONDS)
        _log.info("ended", extra={"reason": self._end})

    def _on_event(self, event: Event) -> None:
        if event.name == "SUPERVISOR_STATE_CHANGE_STOPPING":
            self._end = "supervisord is stopping"
        if event.name == "REMOTE_COMMUNICATION":
            self._has_requests = True
        self._wake.set()

    def _on_end(self, reason: str) -> None:
        self._end = self._end or reason
        self._wake.set()

    def _pause(self) -> float:
        """A little uneven, so that many listeners do not beat in step."""
        phases = {state.phase for state in self._states.values()}
        if phases & _ENDING:
            pause = _ENDING_TICK_SECONDS
        elif self._commands.is_swapping or phases & UNDER_WAY:
            pause = _BUSY_TICK_SECONDS
        else:
            pause = min(
                max(self._turn_seconds / _IDLE_SHARE, _IDLE_TICK_SECONDS),
                _LONGEST_IDLE_TICK_SECONDS,
            )
        return min(pause, self._until_retry()) * random.uniform(0.9, 1.1)  # noqa: S311 - not a secret

    def _until_retry(self) -> float:
        """Seconds until the next model has waited long enough."""
        waiting = (state.retries.retry_at for state in self._states.values())
        now = time.monotonic()
        ahead = [at - now for at in waiting if at is not None and at > now]
        return max(min(ahead, default=_LONGEST_IDLE_TICK_SECONDS), _SHORTEST_TICK_SECONDS)

    async def _turn(self) -> None:
        """Observe, decide, act, publish; what fails is logged, and the next turn tries anew."""
        try:
            self._read_registry()
            self._forgive_blindness()
            await self._heed_requests()
            seen = await self._observe()
            decision = decide(self._states, seen, _now(), self._policy(), self._memory.readings)
            if not await self._tell_launchers(seen, decision):
                self._wake.set()  # somebody started a model meanwhile: look again
                return
            self._states = {**self._of_absent(decision.states), **decision.states}
            self._ledger = decision.ledger
            self._remember()
            self._record(decision.transitions)
            await self._act(decision)
            await self._publish(seen)
        except ShuttingDown as error:
            self._on_end(str(error))
        except TransientError as error:
            _log.warning("turn failed", extra={"reason": str(error)})
        except Exception:
            _log.exception("turn failed")

    def _policy(self) -> Policy:
        settings = self._world.registry.settings
        return Policy(
            settings.max_parallel, settings.restart, settings.memory_reserve, settings.when_full,
            settings.climb_after_seconds, settings.overcommit_sleepers, settings.trial_seconds,
            settings.gateway.idle_stop_seconds,
        )  # fmt: skip

    def _read_registry(self) -> None:
        try:
            status = self._deployment.registry.stat()
        except OSError:
            return  # none yet, or not now: what was read last is good
        stamp = (status.st_mtime_ns, status.st_ino)
        if stamp == self._world.stamp:
            return
        found = registry.load(self._deployment.registry)
        if self._deployment.registry.exists():
            self._world = _World(found, stamp)
        else:
            _log.warning("registry set aside", extra={"reason": "torn; the last one read holds"})

    def _forgive_blindness(self) -> None:
        """A listener that was frozen must not hold its own absence against the servers."""
        now = time.monotonic()
        away, self._looked_at = now - self._looked_at, now
        if away > _BLIND_SECONDS:
            _log.warning("was away", extra={"seconds": f"{away:.1f}"})
            self._observer.forgive(away)

    async def _observe(self) -> list[Seen]:
        found = {process.name: process for process in await self._call(self._rpc.process_table)}
        # First, since an edit changes what a model needs, and so whether it may start.
        await self._look_at_blocks(found)
        self._gateway_process = found.get(PROGRAM)
        programs = self._world.registry.programs
        wanted = {program.name: self._commands.wanted(program) for program in programs}
        wanted |= self._standing_in(wanted)
        policy = self._world.registry.settings.probe
        devices = self._world.registry.devices
        seen = await self._observer.look(programs, found, wanted, self._states, policy, devices)
        await self._look_at_memory(programs)
        by_name = {program.name: program for program in programs}
        return [self._whole(one, by_name[one.name]) for one in seen]

    def _standing_in(self, wanted: Mapping[str, Wanted]) -> dict[str, Wanted]:
        """Models that the settings replace by another quantization, which has yet to show that it
        works: until it is ready they go on, and they come back where it failed.
        """
        found = {}
        for old, new in self._world.registry.successors.items():
            state, standing = self._states.get(new, ModelState()), self._standing(new)
            if old not in wanted or wanted[old].enabled or not wanted.get(new, _NOBODY).enabled:
                continue
            if standing.good or state.phase is Phase.READY:
                continue
            has_failed = state.last_failure is not None
            is_up = self._observer.watched(old) is not None
            if has_failed or (is_up and state.phase is not Phase.DEFERRED):
                why = "has failed" if has_failed else "is not ready yet"
                found[old] = Wanted(True, f"{new} is to take its place, and {why}")
        return found

    def _standing(self, name: str) -> Standing:
        return self._blocks_seen.standings.get(name, _UNKNOWN)

    async def _look_at_blocks(self, found: Mapping[str, Process]) -> None:
        before = self._blocks_seen.standings
        look = partial(self._blocks.look, self._world.registry, found)
        self._blocks_seen = await self._call(look)
        self._read_registry()
        if before:
            self._tell_refusals(before)

    def _tell_refusals(self, before: Standings) -> None:
        """A block that was refused before it was tried is no transition, and said all the same."""
        at = time.time()
        lines = []
        for name, standing in self._blocks_seen.standings.items():
            refused = standing.refused
            earlier = before.get(name)
            is_new = earlier is None or earlier.refused != refused
            if refused is None or refused.was_tried or refused.failure is None or not is_new:
                continue
            phase = self._states[name].phase.value if name in self._states else "disabled"
            kind = refused.failure.failure_class.value
            lines.append(
                history.Line(
                    at=at, model=name, before=phase, after=phase,
                    reason="a changed block was refused, and the former one stays",
                    failure_class=kind, evidence=refused.failure.message,
                )
            )  # fmt: skip
        self._tell(lines)

    def _whole(self, seen: Seen, program: Program) -> Seen:
        """With its claim on memory, and what is known of its block."""
        name, sight = seen.name, self._blocks_seen
        return replace(
            seen, claim=self._memory.claim(program, seen.incarnation),
            digest=self._standing(name).digest, trial=sight.trials.get(name),
            is_untold=name in sight.untold, is_outdated=name in sight.outdated,
            is_unadopted=name in sight.unadopted,
        )  # fmt: skip

    def _of_absent(self, present: Mapping[str, ModelState]) -> dict[str, ModelState]:
        """`supervisorctl update` takes a program away before it adds it anew: that it was stopped
        by hand is not forgotten for that.
        """
        names = {program.name for program in self._world.registry.programs}
        return {
            name: replace(state, rests=True)
            for name, state in self._states.items()
            if name in names and name not in present and is_at_rest_by_hand(state, _now())
        }

    async def _look_at_memory(self, programs: Iterable[Program]) -> None:
        runs = {}
        for program in programs:
            watched = self._observer.watched(program.name)
            if watched is not None:
                runs[program.name] = Run(
                    program, watched.incarnation, watched.live.was_ready, watched.loaded
                )
        is_awaited = any(
            state.phase in (Phase.PENDING, Phase.DEFERRED) for state in self._states.values()
        )
        await self._memory.look(
            self._world.registry, self._world.stamp, runs, self._observer.leaving,
            is_awaited=is_awaited,
        )  # fmt: skip

    # --- commands ---------------------------------------------------------------------------------

    async def _heed_requests(self) -> None:
        """Carry out what was asked through XML-RPC, and answer; each command may come twice."""
        programs = {program.name: program for program in self._world.registry.programs}
        await self._advance_swaps(programs)
        if not self._has_requests:
            return
        self._has_requests = False
        for request in await self._call(self._rpc.requests):
            self._states, answer = await self._to_disk(
                partial(self._commands.heed, request, self._states, programs)
            )
            if answer is not None:
                await self._answer(answer)

    async def _advance_swaps(self, programs: Mapping[str, Program]) -> None:
        if not self._commands.is_swapping:
            return
        try:
            self._states, answers = await self._to_disk(
                partial(self._commands.advance, self._states, programs)
            )
        except OSError as error:
            self._complain("journal not written", error)
            return
        for answer in answers:
            self._has_requests = True  # those that waited for the end of it
            await self._answer(answer)

    async def _answer(self, answer: Answer) -> None:
        _log.info("command", extra={"ok": answer.ok, "answer": answer.message})
        await self._call(partial(self._rpc.answer, answer.command, answer.ok, answer.message))

    def _fits(self, program: Program) -> bool:
        """Whether a program finds memory beside all that is committed now."""
        return not self._ledger.shortages(self._memory.claim(program).deployed.needs)

    # --- act and tell -----------------------------------------------------------------------------

    async def _tell_launchers(self, seen: Sequence[Seen], decision: Decision) -> bool:
        """What somebody else started is up to its launcher until it is ready: that asks for it.

        False: what was decided no longer holds (see `Memory.tell`).
        """
        claims = {one.name: one.claim for one in seen}
        up = {one.name: one.incarnation for one in seen if one.incarnation is not None}
        asking = frozenset(name for name in up if _is_strange(decision.states[name]))
        counted = [run for name, run in up.items() if name not in asking]
        found = decision.ledger.without_claims_of(asking)
        return await self._memory.tell(found, claims, up.values(), counted)

    async def _act(self, decision: Decision) -> None:
        if any(_is_for_a_while(action, decision) for action in decision.actions):
            await self._remembered()  # else it would look stopped by hand to a listener after this
        for action in decision.actions:
            refusal = await self._call(partial(self._effects.perform, action))
            if isinstance(action, RollBack | Renew):
                self._hindered[action.name] = refusal
            if refusal:
                _log.warning(
                    "refused",
                    extra={
                        "action": type(action).__name__, "model": action.name, "reason": refusal,
                    },
                )  # fmt: skip
        if decision.actions or decision.transitions:
            self._wake.set()  # the next step follows at once

    def _remember(self) -> None:
        """Begin to write down what the listener after us must know; while that takes long, only
        the newest is written next.
        """
        if self._saving is None and self._states != self._saved:
            self._saving = asyncio.create_task(self._save(self._states))

    async def _remembered(self) -> None:
        """What is known now stands on the disk, unless that does not take it."""
        for _ in range(2):  # the first may be of what was known before
            if self._saving is not None:
                await self._saving
            self._remember()
        if self._saving is not None:
            await self._saving

    async def _save(self, current: Mapping[str, ModelState]) -> None:
        try:
            await self._to_disk(partial(states.save, self._deployment.state, self._boot, current))
            self._saved = current
            self._complained.pop("state not written", None)
        except OSError as error:
            self._complain("state not written", error)
        finally:
            self._saving = None

    def _record(self, transitions: Iterable[Transition]) -> None:
        """History and log: one line for each transition."""
        at = time.time()
        lines = [_line(change, at) for change in transitions]
        for line in lines:
            if line.failure_class is not None:
                self._failures.setdefault(line.model, Counter())[line.failure_class] += 1
        self._tell(lines)

    def _tell(self, lines: list[history.Line]) -> None:
        for line in lines:
            _log.info("transition", extra=_words(line))
        self._notifier.tell(lines, self._world.registry.settings.notify)
        if lines:
            self._untold = [*self._untold, *lines][-_MOST_LINES:]
            task = asyncio.create_task(self._append(lines))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    async def _append(self, lines: list[history.Line]) -> None:
        try:
            await self._to_disk(partial(history.append, self._deployment.history, lines))
        except OSError as error:
            self._complain("history not written", error)

    def _complain(self, what: str, error: OSError) -> None:
        """Once a minute: a full disk must not be filled with complaints about it."""
        now = time.monotonic()
        if now - self._complained.get(what, -_REPEAT_SECONDS) >= _REPEAT_SECONDS:
            self._complained[what] = now
            _log.warning(what, extra={"file": error.filename, "reason": error.strerror})

    async def _publish(self, seen: Iterable[Seen]) -> None:
        """Hand the plugin what is new; where nothing is, a sign of life."""
        await self._hand_over_history()
        rows = self._rows(seen)
        self._tell_gateway(rows)
        devices = device_rows(self._world.registry.devices, self._ledger)
        now = time.monotonic()
        before = self._published
        is_due = now - before.at >= _FIGURES_SECONDS
        has_moved = (rows, devices) != (before.rows, before.devices)
        if _cannot_wait(rows, before.rows) or (is_due and has_moved):
            snapshot = Snapshot(time.time(), rows, devices, self._about_itself())
            waiting = await self._call(partial(self._rpc.publish, snapshot))
            self._published = _Published(rows, devices, now, now)
        elif now - before.heard_at >= _BEAT_SECONDS:
            waiting = await self._call(self._rpc.beat)
            self._published = replace(before, heard_at=now)
        else:
            return
        self._has_requests = self._has_requests or waiting > 0

    def _tell_gateway(self, rows: tuple[Row, ...]) -> None:
        registry = self._world.registry
        stand_ins = {one.name: self._stand_in(one) for one in registry.programs if one.fallback}
        verdicts = {
            row.name: verdict(
                row, has_way_back=row.name in self._states and self._states[row.name].resume,
                fallback=stand_ins.get(row.name, ""),
            )
            for row in rows
        }  # fmt: skip
        settings = registry.settings.gateway
        self._gateway.tell(View(settings, registry.programs, rows, verdicts, self._gateway_process))

    def _stand_in(self, program: Program) -> str:
        """The model that serves in its place now; "" where it serves itself."""
        claim = self._memory.claim(program)
        return claim.fallback if claim.is_on_fallback else ""

    async def _hand_over_history(self) -> None:
        """What is new; at first also what stood in the file before."""
        if self._earlier is not None:
            await self._call(partial(self._rpc.record, self._earlier, anew=True))
            self._earlier = None
        if self._untold:
            lines = self._untold
            await self._call(partial(self._rpc.record, [history.public(one) for one in lines]))
            self._untold = self._untold[len(lines) :]

    def _about_itself(self) -> ListenerRow:
        return ListenerRow(
            os.getpid(), VERSION, self._began_at, round(self._turn_seconds, 4),
            round(self._lag_seconds, 4),
        )  # fmt: skip

    def _rows(self, seen: Iterable[Seen]) -> tuple[Row, ...]:
        programs = {program.name: program for program in self._world.registry.programs}
        standings = self._blocks_seen.standings
        now = time.monotonic()
        hindered = self._hindrances()
        present = {
            one.name: _row(
                programs[one.name], one, self._states[one.name], self._observer.watched(one.name),
                self._memory.estimate(programs[one.name]),
                self._memory.measured(programs[one.name], one.incarnation),
                standings.get(one.name, _UNKNOWN), hindered.get(one.name, ""),
                self._failures.get(one.name, {}), now,
            )
            for one in seen
        }  # fmt: skip
        found = present | self._absent(present, now)
        return tuple(found[name] for name in programs if name in found)

    def _absent(self, present: Mapping[str, Row], now: float) -> dict[str, Row]:
        """Models that `supervisorctl update` has taken away, and is about to add anew."""
        gone = {
            row.name: replace(row, state=ProcessState.STOPPED, pid=0)
            for row in self._published.rows or ()
            if row.name not in present
        }
        self._absent_since = {name: self._absent_since.get(name, now) for name in gone}
        return {
            name: row
            for name, row in gone.items()
            if now - self._absent_since[name] < _ABSENT_SECONDS
        }

    def _hindrances(self) -> dict[str, str]:
        """Why changed blocks are not in place, in words to be added to a reason."""
        sight = self._blocks_seen
        self._hindered = {
            name: why
            for name, why in self._hindered.items()
            if why and (name in sight.untold or name in sight.trials)
            and name in self._states and self._states[name].phase is not Phase.READY
        }  # fmt: skip
        found = {
            name: f"; its former block is not in place: {why}"
            for name, why in self._hindered.items()
        }
        if sight.broken:
            waiting = sight.untold | sight.unadopted
            found |= dict.fromkeys(waiting, f"; supervisord cannot read {sight.broken}")
        return found

    async def _call(self, function: Callable[[], _T]) -> _T:
        """On the one thread that speaks XML-RPC."""
        return await asyncio.get_running_loop().run_in_executor(self._rpc_thread, function)

    async def _to_disk(self, function: Callable[[], _T]) -> _T:
        """On the one thread that writes, in the order of the calls.

        Only what a command must be sure of is waited for: a slow disk delays no start.
        """
        return await asyncio.get_running_loop().run_in_executor(self._disk_thread, function)


def _is_for_a_while(action: Action, decision: Decision) -> bool:
    """Whether a model is stopped or replaced that shall come back by itself."""
    return isinstance(action, Stop | SetRung) and decision.states[action.name].resume


def _is_strange(state: ModelState) -> bool:
    """Whether its run was not started by us, and has not become ready yet."""
    return not state.was_ready and (state.asked_at is None or state.started_at != state.asked_at)


def _now() -> Now:
    return Now(time.monotonic(), time.time(), random.random())  # noqa: S311 - not a secret


def _line(change: Transition, at: float) -> history.Line:
    run, failure = change.incarnation, change.failure
    return history.Line(
        at=at, model=change.model, before=change.before.value if change.before else None,
        after=change.after.value, reason=change.reason, pid=run.pid if run else None,
        started=run.started_at if run else None,
        failure_class=failure.failure_class.value if failure else None,
        evidence=failure.message if failure else "",
    )  # fmt: skip


def _words(line: history.Line) -> dict[str, object]:
    """The same for the log, which has a time of its own."""
    return {
        "model": line.model, "pid": line.pid, "from": line.before, "to": line.after,
        "reason": line.reason, "class": line.failure_class, "evidence": line.evidence,
    }  # fmt: skip


def _row(
    program: Program,
    seen: Seen,
    state: ModelState,
    watched: Watched | None,
    estimate: Estimate,
    measured_bytes: int | None,
    standing: Standing,
    hindrance: str,
    failures: Mapping[str, int],
    now: float,
) -> Row:
    served = watched.served if watched else planned(program)
    is_waiting = state.phase in (Phase.BACKOFF, Phase.FAILED)
    retry_at = state.retries.retry_at if is_waiting else failover.next_trial_at(state)
    return Row(
        name=program.name, repo=program.repo, file=program.file, tier=program.tier,
        role=program.role, enabled=seen.enabled, phase=state.phase,
        reason=_with_refusal(state.reason, standing) + hindrance,
        state=seen.state, pid=seen.incarnation.pid if seen.incarnation else 0, port=served.port,
        url=served.url, alias=served.alias, context=served.context, parallel=served.parallel,
        device=program.device, estimated_bytes=estimate.total_bytes,
        estimate_source=estimate.source.value,
        measured_bytes=measured_bytes or (watched.memory_bytes if watched else None),
        slots_busy=slots_busy(watched) if watched else None, slots_total=served.parallel,
        restarts=state.restarts, ready_seconds=state.ready_seconds if seen.incarnation else None,
        generation=standing.generation, trial=standing.on_trial,
        last_failure=_last_failure(state, standing),
        next_retry_seconds=None if retry_at is None else round(max(retry_at - now, 0.0)),
        started_at=seen.incarnation.started_at if seen.incarnation else None,
        breaker=_breaker(state.retries), failures=tuple(sorted(failures.items())),
        usage=usage(watched) if watched else Usage(),
    )  # fmt: skip


def _breaker(retries: Restarts) -> Breaker:
    if retries.is_open:
        return Breaker.OPEN
    return Breaker.HALF_OPEN if retries.is_trial else Breaker.CLOSED


def _cannot_wait(rows: tuple[Row, ...], before: tuple[Row, ...] | None) -> bool:
    """Whether more has changed than figures that move all the time."""
    if before is None or len(rows) != len(before):
        return True
    return any(
        row != old and replace(row, usage=old.usage) != old
        for row, old in zip(rows, before, strict=True)
    )


def _with_refusal(reason: str, standing: Standing) -> str:
    """What a model's changed block was taken back for stands beside what it does now."""
    refused = standing.refused
    if refused is None:
        return reason
    if refused.failure is None:
        return f"{reason}; has its former block, by command"
    kind, message = refused.failure.failure_class.value, refused.failure.message
    return f"{reason}; a changed block was rejected: {kind}: {message}"


def _last_failure(state: ModelState, standing: Standing) -> Failure | None:
    refused = standing.refused.failure if standing.refused is not None else None
    known = [one for one in (state.last_failure, refused) if one is not None]
    return max(known, key=lambda one: one.at, default=None)


class _KeyValueFormatter(logging.Formatter):
    """`2026-01-02T03:04:05 INFO event key=value …`, one line for each record."""

    _STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}

    def format(self, record: logging.LogRecord) -> str:
        pairs = [
            f"{key}={_shown(value)}"
            for key, value in record.__dict__.items()
            if key not in self._STANDARD and value not in (None, "")
        ]
        head = f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')} {record.levelname}"
        line = " ".join([head, record.getMessage(), *pairs])
        if record.exc_info:
            line += " traceback=" + ascii(self.formatException(record.exc_info))
        return line


def _shown(value: object) -> str:
    text = str(value)
    return text if text.isascii() and text.isprintable() and " " not in text else ascii(text)


def listen(deployment: Deployment, deployer: effects.Deployer) -> None:
    """Run the listener on stdin and stdout, as supervisord starts it. Logs go to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_KeyValueFormatter())
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    processes.die_with_parent()  # also when frozen, where no end of stdin would be noticed
    asyncio.run(Listener(deployment, deployer).run())
    # What is still out on a thread (a question to a silent server) must not hold up the end.
    sys.stderr.flush()
    os._exit(0)
