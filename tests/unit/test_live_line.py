"""A live line: written over on terminals, nothing elsewhere."""

from __future__ import annotations

import io

import pytest

from dispatcher.telemetry.live_line import ANEW, LiveLine, say


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_is_written_over_on_a_terminal() -> None:
    stream = Terminal()
    line = LiveLine(stream)
    assert line.is_live
    line.show("1 of 2")
    line.show("2 of 2")
    line.end()
    line.clear()
    assert stream.getvalue() == f"{ANEW}1 of 2{ANEW}2 of 2\n{ANEW}"


def test_nothing_is_written_anywhere_else() -> None:
    stream = io.StringIO()
    line = LiveLine(stream)
    assert not line.is_live
    line.show("1 of 2")
    line.end()
    line.clear()
    assert stream.getvalue() == ""


def test_what_is_said_takes_the_place_of_the_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say("plain")
    assert capsys.readouterr().err == "flexlb: plain\n"
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    LiveLine().show("waiting")
    say("done")
    assert stream.getvalue() == f"{ANEW}waiting{ANEW}flexlb: done\n"
