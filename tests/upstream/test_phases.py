"""The phases of a dial: which one it is in, and when what was measured is recorded."""

import time

from proxy.upstream.phases import ConnectPhase, DialPhases


def test_a_dial_shows_the_phase_that_was_started_last_or_that_it_waits_for_a_slot() -> None:
    phases = DialPhases()
    assert (phases.current, phases.waits_for_slot) == (None, False)
    phases.start(ConnectPhase.MINT)
    phases.finish()
    assert (phases.current, phases.waits_for_slot) == (ConnectPhase.MINT, False)
    phases.wait_for_slot()
    assert (phases.current, phases.waits_for_slot) == (None, True)
    phases.start(ConnectPhase.TCP)
    assert (phases.current, phases.waits_for_slot) == (ConnectPhase.TCP, False)


def test_a_phase_that_succeeded_is_recorded_once_and_not_before_a_flush() -> None:
    recorded: list[tuple[ConnectPhase | None, float]] = []
    phases = DialPhases()
    phases.record = lambda phase, seconds: recorded.append((phase, seconds))
    for phase in (ConnectPhase.DNS, ConnectPhase.TCP):
        phases.start(phase)
        phases.finish()
    phases.start(ConnectPhase.TLS)  # and fails
    assert recorded == []
    phases.flush()
    phases.flush()
    assert [phase for phase, _ in recorded] == [ConnectPhase.DNS, ConnectPhase.TCP]
    assert all(seconds >= 0 for _, seconds in recorded)


def test_a_dial_that_succeeded_is_recorded_whole_with_its_failed_tries() -> None:
    recorded: list[tuple[ConnectPhase | None, float]] = []
    phases = DialPhases()
    phases.record = lambda phase, seconds: recorded.append((phase, seconds))
    phases.start(ConnectPhase.TCP)  # and fails
    began_at = time.perf_counter()
    while time.perf_counter() < began_at + 0.01:
        pass
    phases.start(ConnectPhase.TCP)
    phases.finish()
    phases.succeed()
    phases.flush()
    (tcp, tcp_seconds), (whole, whole_seconds) = recorded
    assert (tcp, whole) == (ConnectPhase.TCP, None)
    assert whole_seconds >= tcp_seconds + 0.01


def test_the_phases_of_a_cancel_are_recorded_nowhere() -> None:
    phases = DialPhases()
    phases.start(ConnectPhase.DNS)
    phases.finish()
    phases.flush()
    assert phases.current is ConnectPhase.DNS
