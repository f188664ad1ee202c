"""Asking a run to stop, and the exit codes."""

from __future__ import annotations

import signal
from pathlib import Path

from mft.launch.signals import Stop, Stopped, exit_code, handlers


def test_exit_codes(tmp_path: Path) -> None:
    assert exit_code(tmp_path, signal.SIGTERM) == 143
    (tmp_path / "summary.json").write_text('{"status": "stopped"}')
    assert exit_code(tmp_path, signal.SIGTERM) == 75
    assert exit_code(tmp_path, signal.SIGINT) == 130
    # a signal that came while it was tested: a scheduler that looks for 75 does not start it again
    (tmp_path / "summary.json").write_text('{"status": "finished"}')
    assert exit_code(tmp_path, signal.SIGTERM) == 0
    assert exit_code(tmp_path, signal.SIGINT) == 130
    assert isinstance(Stopped(signal.SIGINT, 130), KeyboardInterrupt)


def test_later_signals_change_nothing() -> None:
    stop = Stop()
    assert not stop()
    stop.request(signal.SIGTERM)
    stop.request(signal.SIGINT)
    assert stop() and stop.signal == signal.SIGTERM


def test_handlers_are_those_of_before_again_and_an_ignored_signal_stays_ignored() -> None:
    before, ended_by = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)
    try:
        stop = Stop()
        with handlers(stop.request):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is ended_by
    finally:
        signal.signal(signal.SIGHUP, before)
