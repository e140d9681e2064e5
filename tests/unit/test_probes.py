"""Healthy servers that look dead, and dead ones that look healthy, each watched for hours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor_synapse.core import probes
from supervisor_synapse.core.model import Health
from supervisor_synapse.core.probes import BAD, Activity, Liveness, Verdict
from supervisor_synapse.core.settings import ProbePolicy

POLICY = ProbePolicy()  # every 5 s, 2 s, three misses, 120 s
HOUR_SECONDS = 3600
PATIENCE_SECONDS = POLICY.stall_seconds + 10.0
IDLE = Activity(0, (0,))

Told = Activity | None  # None: no answer at this time


@dataclass(slots=True)
class Server:
    """What a server answers at a time; healthy, awake and idle unless a test says otherwise."""

    health: Callable[[float], Health] = lambda now: Health.READY
    counters: Callable[[float], Told] = lambda now: IDLE
    token: Callable[[float], bool] = lambda now: True
    sleeps: Callable[[float], bool] = lambda now: False


@dataclass(slots=True)
class Watch:
    """Asks as the listener does: each period a quick question, and one patient one at a time."""

    server: Server
    policy: ProbePolicy = POLICY
    parallel: int = 4
    now: float = 0.0
    live: Liveness = field(default_factory=lambda: probes.begin(0.0))
    verdicts: list[tuple[float, Verdict]] = field(default_factory=list)
    canaries: list[float] = field(default_factory=list)
    patient: list[float] = field(default_factory=list)

    def run(self, seconds: float, step: float = 1.0) -> Watch:
        end = self.now + seconds
        while self.now < end:
            self._listen()
            if self.now % self.policy.period_seconds == 0:
                self._ask()
                self._listen()
            verdict, reason = probes.judge(self.live, self.now, self.policy)
            assert reason or verdict not in BAD
            self.verdicts.append((self.now, verdict))
            self.now += step
        return self

    def _ask(self) -> None:
        if self.live.was_ready and self.server.sleeps(self.now):
            self.live = probes.on_sleep(self.live, self.now)
            return
        health = self.server.health(self.now)
        self.live = probes.on_health(self.live, health, self.now)
        if not self.live.was_ready or health is not Health.READY:
            return
        if self.live.asked_at is None:
            self.live = probes.on_asked(self.live, self.now)
            self.patient.append(self.now)
            self._listen()
        interval = probes.canary_seconds(self.policy, self.parallel)
        if probes.wants_canary(self.live, self.now, interval):
            self.live = probes.on_canary(self.live, self.now)
            self.canaries.append(self.now)

    def _listen(self) -> None:
        """What came back, or was given up."""
        live = self.live
        if live.asked_at is not None:
            told = self.server.counters(self.now)
            if told is not None:
                self.live = probes.on_activity(self.live, told, self.now)
            elif self.now - live.asked_at >= PATIENCE_SECONDS:
                self.live = replace(probes.on_unanswered(self.live), activity=None)
        if live.canary_at is not None and self.now > live.canary_at:
            answered = self.server.token(self.now)
            if answered or self.now - live.canary_at >= PATIENCE_SECONDS:
                self.live = probes.on_canary_answer(self.live, self.now, answered=answered)

    def found(self, verdict: Verdict) -> float:
        """When it was first said."""
        return next(at for at, one in self.verdicts if one is verdict)

    @property
    def said(self) -> set[Verdict]:
        return {verdict for _, verdict in self.verdicts}


def batches(seconds: float, *, busy: int = 1) -> Callable[[float], Activity]:
    """Work whose counters move once a batch, answered at any time."""
    return lambda now: Activity(busy, (int(now // seconds),))


def between(told: Callable[[float], Activity], seconds: float) -> Callable[[float], Told]:
    """The same where the counters are answered only between two batches."""
    return lambda now: told(now) if now % seconds < 1.0 else None


def until(moment: float, before: Callable[[float], Told], after: Told) -> Callable[[float], Told]:
    return lambda now: before(now) if now < moment else after


# --- healthy, whatever it looks like --------------------------------------------------------------


def test_an_idle_server_is_ready_and_asked_for_a_token_now_and_then() -> None:
    """Each time it has been idle for a quarter of the stall time."""
    watch = Watch(Server()).run(HOUR_SECONDS)
    assert watch.said == {Verdict.READY}
    assert len(watch.canaries) == pytest.approx(HOUR_SECONDS / 30, rel=0.3)


def test_the_only_slot_of_a_server_is_left_alone_much_longer() -> None:
    """A token costs it the prompt that it remembers."""
    watch = Watch(Server(), parallel=1).run(HOUR_SECONDS)
    assert 1 <= len(watch.canaries) <= 6


def test_a_saturated_server_is_ready_and_never_asked_for_a_token() -> None:
    """All slots work, hundreds wait; it would only queue."""
    watch = Watch(Server(counters=batches(1.0, busy=4))).run(2 * HOUR_SECONDS)
    assert watch.said == {Verdict.READY}
    assert not watch.canaries


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("seconds", [3.0, 40.0, 100.0])
def test_an_hour_long_prompt_in_slow_batches_is_healthy(blocks: bool, seconds: float) -> None:
    """On builds that answer all the time, and on those that answer between two batches."""
    told = batches(seconds)
    counters = between(told, seconds) if blocks else told
    idle_first = until(60.0, lambda now: IDLE, None)
    watch = Watch(Server(counters=lambda now: idle_first(now) or counters(now)))
    assert watch.run(HOUR_SECONDS).said == {Verdict.READY}


def test_a_prompt_that_begins_just_after_a_token_was_asked_for_is_healthy() -> None:
    """The token waits behind it for longer than anybody has patience."""
    begins = 31.0
    server = Server(counters=until(begins, lambda now: IDLE, None), token=lambda now: now < begins)
    told = batches(100.0, busy=4)
    server.counters = lambda now: IDLE if now < begins else told(now - begins)
    watch = Watch(server).run(HOUR_SECONDS)
    assert watch.canaries
    assert watch.said == {Verdict.READY}


def test_a_sleeping_server_is_healthy_and_asked_nothing_that_would_wake_it() -> None:
    """For hours; and when it wakes, sleep counts neither as work nor as standing still."""
    watch = Watch(Server(sleeps=lambda now: now >= 20.0)).run(2 * HOUR_SECONDS)
    assert watch.said == {Verdict.READY}
    assert not watch.canaries
    assert max(watch.patient) < 20.0
    assert watch.live.is_asleep
    watch.server = Server(counters=batches(100.0))
    watch.run(HOUR_SECONDS)
    assert watch.said == {Verdict.READY}


def test_a_server_that_tells_nothing_of_its_work_is_taken_at_its_health() -> None:
    """No evidence, no verdict, and no token asked of a server that may be busy."""
    live = probes.on_health(probes.begin(0.0), Health.READY, 0.0)
    for now in range(0, HOUR_SECONDS, 5):
        live = probes.on_health(live, Health.READY, float(now))
        live = probes.on_activity(probes.on_asked(live, float(now)), None, float(now))
        assert probes.judge(live, float(now), POLICY)[0] is Verdict.READY
        assert not probes.wants_canary(live, float(now), 30.0)


@pytest.mark.parametrize("miss", [Health.SILENT, Health.REFUSED, Health.BROKEN])
@pytest.mark.parametrize("misses", [1, 2])
def test_missed_probes_short_of_the_threshold_are_harmless(miss: Health, misses: int) -> None:
    """Again and again, each followed by an answer."""
    cycle = 5.0 * (misses + 1)
    watch = Watch(Server(health=lambda now: Health.READY if now % cycle < 5.0 else miss))
    assert watch.run(HOUR_SECONDS).said == {Verdict.READY, Verdict.MISSED}


def test_an_unknown_answer_changes_nothing() -> None:
    live = probes.on_health(probes.begin(0.0), Health.READY, 1.0)
    missed = probes.on_health(live, Health.SILENT, 6.0)
    for state in (probes.begin(0.0), live, missed):
        assert probes.on_health(state, Health.UNKNOWN, 100.0) == state


def test_a_slow_load_that_moves_is_never_stuck() -> None:
    """503 for an hour, while its log, its memory or what it has read grows now and then."""
    live = probes.begin(0.0)
    for now in range(0, HOUR_SECONDS):
        live = probes.on_health(live, Health.LOADING, float(now))
        live = probes.on_footprint(live, (now // 110, 7), float(now))
        assert probes.judge(live, float(now), POLICY)[0] is Verdict.LOADING


def test_a_server_that_refuses_before_it_has_a_socket_is_loading() -> None:
    """Refusals while it was never ready are no misses."""
    live = probes.begin(0.0)
    for now in range(10):
        live = probes.on_health(live, Health.REFUSED, float(now))
    assert probes.judge(live, 10.0, POLICY)[0] is Verdict.LOADING


def test_a_server_that_loads_again_is_not_ready_and_not_dead() -> None:
    """503 after it had been ready: no request would be served now."""
    watch = Watch(Server(health=lambda now: Health.LOADING if 50 <= now < 150 else Health.READY))
    watch.run(HOUR_SECONDS)
    assert watch.said == {Verdict.READY, Verdict.LOADING}
    assert watch.found(Verdict.LOADING) == 50.0
    assert watch.verdicts[-1][1] is Verdict.READY


# --- dead, whatever it looks like -----------------------------------------------------------------


@pytest.mark.parametrize("begins", [0.0, 301.0, 333.0])
def test_compute_frozen_under_a_request_is_found_in_the_stall_time_and_a_period(
    begins: float,
) -> None:
    """Every endpoint answers 200; /health alone would say ready for ever."""
    frozen = Activity(2, (int(begins),))
    watch = Watch(Server(counters=until(begins, batches(1.0, busy=2), frozen)))
    watch.run(begins + 200.0)
    late = watch.found(Verdict.WEDGED) - begins
    assert POLICY.stall_seconds - 5.0 <= late <= POLICY.stall_seconds + POLICY.period_seconds + 1
    assert watch.live.health is Health.READY


@pytest.mark.parametrize("busy", [True, False])
def test_counters_that_never_come_again_are_found_in_the_stall_time_and_a_period(
    busy: bool,
) -> None:
    """Where the counters block, the question that is out is the evidence."""
    begins = 302.0
    before = batches(1.0) if busy else (lambda now: IDLE)
    watch = Watch(Server(counters=until(begins, before, None), token=lambda now: now < begins))
    watch.run(begins + 200.0)
    late = watch.found(Verdict.WEDGED) - begins
    assert late <= POLICY.stall_seconds + POLICY.period_seconds + 1


def test_an_idle_server_that_hangs_is_found_by_the_token_that_does_not_come() -> None:
    """It says that it is idle, and healthy; nobody has asked it for anything."""
    begins = 302.0
    watch = Watch(Server(token=lambda now: now < begins)).run(600.0)
    interval = probes.canary_seconds(POLICY, watch.parallel)
    late = watch.found(Verdict.WEDGED) - begins
    assert late <= interval + POLICY.stall_seconds + 2 * POLICY.period_seconds


def test_an_idle_server_whose_slot_is_taken_by_the_token_for_ever_is_found() -> None:
    """Our own question shows as a busy slot, and that slot does not move."""
    begins = 302.0
    server = Server(token=lambda now: now < begins)
    watch = Watch(server)
    server.counters = lambda now: (
        Activity(1, (0,)) if now > begins and watch.canaries and watch.canaries[-1] > begins
        else IDLE
    )  # fmt: skip
    watch.run(600.0)
    assert watch.found(Verdict.WEDGED) - begins <= 30.0 + 120.0 + 10.0


def test_a_wedge_stays_one_until_something_moves() -> None:
    """It is not forgotten because a patient question was given up; work, late, is life."""
    watch = Watch(Server(counters=until(100.0, batches(1.0), Activity(1, (99,))))).run(600.0)
    first = watch.found(Verdict.WEDGED)
    assert {verdict for at, verdict in watch.verdicts if at > first} == {Verdict.WEDGED}
    watch.server = Server(counters=batches(1.0))
    assert watch.run(10.0).verdicts[-1][1] is Verdict.READY


@pytest.mark.parametrize("miss", [Health.SILENT, Health.REFUSED, Health.BROKEN])
def test_probes_missed_up_to_the_threshold_are_unresponsive(miss: Health) -> None:
    """Three in a row."""
    watch = Watch(Server(health=lambda now: Health.READY if now < 50.0 else miss)).run(100.0)
    assert watch.found(Verdict.MISSED) == 50.0
    assert watch.found(Verdict.UNRESPONSIVE) == 60.0


def test_a_process_that_a_signal_stopped_needs_only_one_miss() -> None:
    """The system says why it is silent; without a miss it is only told to be stopped."""
    ready = probes.on_health(probes.begin(0.0), Health.READY, 0.0)
    assert probes.judge(replace(ready, is_halted=True), 1.0, POLICY)[0] is Verdict.READY
    silent = replace(probes.on_health(ready, Health.SILENT, 2.0), is_halted=True)
    assert probes.judge(silent, 2.0, POLICY)[0] is Verdict.UNRESPONSIVE
    back = probes.on_health(silent, Health.READY, 3.0)
    assert probes.judge(back, 3.0, POLICY)[0] is Verdict.READY
    assert (
        probes.judge(probes.on_health(back, Health.SILENT, 4.0), 4.0, POLICY)[0] is Verdict.MISSED
    )


def test_a_load_that_stands_still_is_stuck_after_the_stall_time() -> None:
    live = probes.on_footprint(probes.begin(0.0), (1, 2), 10.0)
    for now in range(10, 200):
        live = probes.on_health(live, Health.LOADING, float(now))
        live = probes.on_footprint(live, (1, 2), float(now))
        stuck = now - 10 >= POLICY.stall_seconds
        expected = Verdict.STUCK if stuck else Verdict.LOADING
        assert probes.judge(live, float(now), POLICY)[0] is expected


def test_a_server_that_says_that_it_loads_for_ever_is_unresponsive() -> None:
    watch = Watch(Server(health=lambda now: Health.READY if now < 50.0 else Health.LOADING))
    watch.run(300.0)
    assert watch.found(Verdict.UNRESPONSIVE) == pytest.approx(50.0 + 120.0, abs=6.0)


def test_another_process_on_its_port_is_told_by_name() -> None:
    live = replace(probes.on_health(probes.begin(0.0), Health.READY, 0.0), foreign="'nc' (pid 7)")
    verdict, reason = probes.judge(live, 1.0, POLICY)
    assert verdict is Verdict.FOREIGN
    assert "'nc' (pid 7)" in reason


# --- what we did not see --------------------------------------------------------------------------


@pytest.mark.parametrize("away", [10.0, 600.0, 36000.0])
def test_time_in_which_nobody_looked_is_no_evidence(away: float) -> None:
    """A busy server, a question out, a load, misses: each goes on where it was."""
    busy = probes.on_activity(
        probes.on_health(probes.begin(0.0), Health.READY, 0.0), Activity(1, (5,)), 10.0
    )
    missed = probes.on_health(probes.on_health(busy, Health.SILENT, 12.0), Health.SILENT, 14.0)
    for live in (busy, missed, probes.on_asked(busy, 12.0), probes.begin(0.0)):
        back = probes.forgive(live, away, 20.0 + away)
        assert probes.judge(back, 20.0 + away, POLICY)[0] not in BAD
        assert back.missed == 0


def test_forgiving_does_not_hide_a_wedge_for_longer_than_we_were_away() -> None:
    live = probes.on_activity(
        probes.on_health(probes.begin(0.0), Health.READY, 0.0), Activity(1, (5,)), 0.0
    )
    back = probes.forgive(live, 300.0, 400.0)  # 100 s seen, 300 s not
    assert probes.judge(back, 419.0, POLICY)[0] is Verdict.READY
    assert probes.judge(back, 421.0, POLICY)[0] is Verdict.WEDGED


def test_a_run_of_which_another_listener_knew_that_it_was_ready_is_judged_as_such() -> None:
    """Frozen while nobody listened: three misses, not a load without end."""
    live = probes.begin(0.0, was_ready=True)
    assert probes.judge(live, 0.0, POLICY)[0] is Verdict.UNKNOWN
    for now in (1.0, 6.0, 11.0):
        live = probes.on_health(live, Health.SILENT, now)
    assert probes.judge(live, 11.0, POLICY)[0] is Verdict.UNRESPONSIVE


def test_an_answer_without_a_question_out_does_no_harm() -> None:
    """It may come after a listener gave it up."""
    live = probes.on_health(probes.begin(0.0), Health.READY, 0.0)
    late = probes.on_canary_answer(probes.on_activity(live, IDLE, 50.0), 50.0, answered=True)
    assert probes.judge(late, 51.0, POLICY)[0] is Verdict.READY


# --- whatever it does -----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    spans=st.lists(
        st.tuples(st.booleans(), st.integers(1, 400), st.integers(1, 105)),
        min_size=1, max_size=12,
    ),
    blocks=st.booleans(),
    parallel=st.sampled_from((1, 4)),
)  # fmt: skip
def test_a_server_that_works_or_idles_is_never_condemned(
    spans: list[tuple[bool, int, int]], blocks: bool, parallel: int
) -> None:
    """Any order of idling and of requests whose batches are faster than the stall time."""
    counter, watch = 0, Watch(Server(), parallel=parallel)
    for is_busy, seconds, batch in spans:
        begins, base = watch.now, counter

        def told(
            now: float, begins: float = begins, base: int = base, batch: int = batch,
            is_busy: bool = is_busy,
        ) -> Told:  # fmt: skip
            if not is_busy:
                return Activity(0, (base,))
            if blocks and (now - begins) % batch >= 1.0:
                return None
            return Activity(1, (base + int((now - begins) // batch),))

        watch.server.counters = told
        whole_batches = -(-seconds // batch) * batch
        watch.run(float(whole_batches))
        counter += whole_batches // batch if is_busy else 0
    assert watch.said <= {Verdict.READY}
