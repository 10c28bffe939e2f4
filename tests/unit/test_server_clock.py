"""A server's clock, as an agent follows it."""

from __future__ import annotations

from dispatcher.backends.clock import Clock, ServerClock

SERVER_MS = 1_700_000_000_000


class Host:
    """A host whose wall clock may be wrong, and a server whose clock is right."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.skew_s = 0.0
        self.server_skew_s = 0.0
        self.clock = ServerClock(Clock(monotonic=lambda: self.now_s, epoch_s=self._epoch_s))

    def _epoch_s(self) -> float:
        return SERVER_MS / 1000 + self.now_s + self.skew_s

    @property
    def right_ms(self) -> int:
        """What the server's clock says now."""
        return int(SERVER_MS + (self.now_s + self.server_skew_s) * 1000)

    def ask(self, *, there_s: float = 0.0, back_s: float = 0.0) -> None:
        """Ask the server: so long on the way there, and back."""
        asked_s = self.now_s
        self.now_s += there_s
        said_ms = self.right_ms
        self.now_s += back_s
        self.clock.heard(said_ms, asked_s)


def test_the_own_clock_counts_until_the_server_is_heard() -> None:
    host = Host()
    host.skew_s = 3600.0
    assert host.clock.now_ms() == host.right_ms + 3_600_000
    assert host.clock.own_ahead_s == 0
    host.ask()
    assert host.clock.now_ms() == host.right_ms
    assert host.clock.own_ahead_s == 3600


def test_a_step_of_the_own_clock_moves_nothing() -> None:
    host = Host()
    host.ask()
    for skew_s in (3600.0, -3600.0):
        host.skew_s = skew_s
        host.now_s += 5
        assert host.clock.now_ms() == host.right_ms
        assert host.clock.own_ahead_s == skew_s


def test_the_error_is_half_of_the_way() -> None:
    host = Host()
    host.ask(there_s=0.4)
    assert host.clock.now_ms() - host.right_ms == 200
    host.ask(there_s=0.002, back_s=0.002)
    assert host.clock.now_ms() == host.right_ms


def test_a_slow_answer_does_not_replace_a_quick_one_until_that_is_old() -> None:
    host = Host()
    host.ask()
    host.now_s += 1
    host.ask(back_s=3.0)
    assert host.clock.now_ms() == host.right_ms
    host.now_s += 200
    host.ask(back_s=3.0)
    assert host.clock.now_ms() - host.right_ms == -1500


def test_a_step_of_the_servers_clock_is_followed() -> None:
    host = Host()
    host.ask(there_s=0.001, back_s=0.001)
    host.server_skew_s = -30.0
    host.now_s += 1
    host.ask(there_s=0.001, back_s=0.003)
    assert abs(host.clock.now_ms() - host.right_ms) <= 1
