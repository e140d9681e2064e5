"""Tells hooks of transitions: a command, a webhook. Whatever they do, the listener's loop goes on.

What is told, and how often, is decided in core/notices.py. Each hook has a row of its own, a task
that works it off, and a thread on which it is waited for. A row is short: when a hook is slower
than what there is to tell, the oldest is dropped and counted.

A command is never run twice for one notice: it may have done its work before it failed. A webhook
is tried a few times where another try may go better; whoever gets a notice twice knows it by its
model and `when`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from supervisor_synapse.adapters import hooks
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.adapters.history import Line
from supervisor_synapse.adapters.hooks import Outcome
from supervisor_synapse.core.notices import (
    Flow,
    Notice,
    Told,
    hold,
    payload,
    release,
    seconds_until_next,
    selected,
)
from supervisor_synapse.core.settings import NotifyPolicy

_MOST_WAITING = 100
_PAUSES_SECONDS = (1.0, 5.0)  # before the second try, and the third
_REPEAT_SECONDS = 60.0  # between two complaints about the same hook

_log = logging.getLogger("synapse")

Deliver = Callable[[str, NotifyPolicy], Outcome]


class Notifier:
    """Hears of each transition and tells whom the settings name; for one loop."""

    def __init__(self, deployment: Deployment, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._policy = NotifyPolicy()
        self._flow = Flow()
        self._timer: asyncio.TimerHandle | None = None
        to_text = partial(_text, hostname=socket.gethostname(), prefix=str(deployment.prefix))
        self._command = Hook("command", partial(_run, deployment), to_text, clock=clock)
        self._webhook = Hook("webhook", _post, to_text, _PAUSES_SECONDS, clock=clock)

    def tell(self, lines: Iterable[Line], policy: NotifyPolicy) -> None:
        """Of these transitions, by these settings. Returns at once."""
        self._policy = policy
        if not self._hooks():
            self._flow = replace(self._flow, held=(), left_out=0)
            return
        for notice in selected(map(_notice, lines), policy):
            self._flow = hold(self._flow, notice)
            self._release()

    def _release(self) -> None:
        rate = self._policy.most_per_minute
        self._flow, due = release(self._flow, self._clock(), rate)
        for told in due:
            for hook in self._hooks():
                hook.put(told, self._policy)
        self._wake_after(seconds_until_next(self._flow, rate))

    def _hooks(self) -> list[Hook]:
        named = ((self._policy.command, self._command), (self._policy.url, self._webhook))
        return [hook for name, hook in named if name]

    def _wake_after(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = None if seconds is None else loop.call_later(seconds, self._release)

    def close(self) -> None:
        """Nothing more is told; what runs ends with this process at the latest."""
        if self._timer is not None:
            self._timer.cancel()
        self._command.close()
        self._webhook.close()


class Hook:
    """Those who are told in one way, one notice after the other."""

    def __init__(
        self,
        kind: str,
        deliver: Deliver,
        to_text: Callable[[Told], str],
        pauses_seconds: Sequence[float] = (),
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`deliver` runs on a thread. `pauses_seconds`: before each further try."""
        self._kind, self._deliver, self._to_text = kind, deliver, to_text
        self._pauses_seconds = pauses_seconds
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, kind)
        self._waiting: deque[Told] = deque()
        self._policy = NotifyPolicy()
        self._lost = 0  # not told, since something was
        self._task: asyncio.Task[None] | None = None
        self._complained_at: float | None = None
        self._failures = 0  # since then

    def put(self, told: Told, policy: NotifyPolicy) -> None:
        """In the row; those before it are told by these settings too."""
        self._policy = policy
        if len(self._waiting) >= _MOST_WAITING:
            self._lose(self._waiting.popleft())
        self._waiting.append(told)
        if self._task is None:
            self._task = asyncio.create_task(self._work())

    def close(self) -> None:
        """Begin nothing more."""
        self._waiting.clear()
        if self._task is not None:
            self._task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _lose(self, told: Told) -> None:
        self._lost += 1 + told.suppressed

    async def _work(self) -> None:
        try:
            while self._waiting:
                told = self._waiting.popleft()
                told, self._lost = replace(told, suppressed=told.suppressed + self._lost), 0
                outcome = await self._tried(self._to_text(told))
                if outcome.problem:
                    self._lose(told)
                    self._complain(told, outcome)
        finally:
            self._task = None

    async def _tried(self, text: str) -> Outcome:
        outcome = await self._once(text)
        for pause in self._pauses_seconds:
            if not outcome.may_pass:
                break
            await asyncio.sleep(pause)
            outcome = await self._once(text)
        return outcome

    async def _once(self, text: str) -> Outcome:
        ask = partial(self._deliver, text, self._policy)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, ask)
        except OSError as error:  # no process, no file descriptor to be had
            return Outcome(error.strerror or type(error).__name__)

    def _complain(self, told: Told, outcome: Outcome) -> None:
        """Once a minute, with how often it was."""
        self._failures += 1
        now = self._clock()
        if self._complained_at is None or now - self._complained_at >= _REPEAT_SECONDS:
            _log.warning(
                "notice not told",
                extra={
                    "by": self._kind, "model": told.notice.model, "reason": outcome.problem,
                    "output": outcome.output, "failures": self._failures,
                },
            )  # fmt: skip
            self._complained_at, self._failures = now, 0


def _notice(line: Line) -> Notice:
    return Notice(
        at=line.at, model=line.model, before=line.before, after=line.after, reason=line.reason,
        failure_class=line.failure_class, evidence=line.evidence, pid=line.pid,
        started=line.started,
    )  # fmt: skip


def _text(told: Told, hostname: str, prefix: str) -> str:
    return json.dumps(payload(told, hostname, prefix)) + "\n"


def _run(deployment: Deployment, text: str, policy: NotifyPolicy) -> Outcome:
    return hooks.run_command(policy.command, text, policy.timeout_seconds, deployment.prefix)


def _post(text: str, policy: NotifyPolicy) -> Outcome:
    from supervisor_synapse.adapters import webhooks

    return webhooks.post(policy.url, policy.url_header_file, text, policy.timeout_seconds)
