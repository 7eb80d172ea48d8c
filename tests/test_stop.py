"""When a program has to stop: signals, save_by in all its forms, and the exit codes that follow."""

import os
import signal
import time
from datetime import UTC, datetime

import pytest

from srlm_fast.errors import Interrupted, UserError
from srlm_fast.rundir import RunDir
from srlm_fast.stop import REQUEUE, STOPPED, Stop, deadline


@pytest.mark.parametrize(
    ("save_by", "expected"),
    [
        ("2h50m", 1000 + 10200),
        ("90m", 1000 + 5400),
        ("1d1s", 1000 + 86401),
        ("0s", 1000),
        ("2026-11-24T06:00+00:00", datetime(2026, 11, 24, 6, tzinfo=UTC).timestamp()),
        ("2026-11-24T06:00", datetime(2026, 11, 24, 6).timestamp()),
        ("slurm-10m", 5_000_000 - 600),
    ],
)
def test_what_save_by_means(save_by, expected):
    assert deadline(save_by, 1000.0, {"SLURM_JOB_END_TIME": "5000000"}) == expected


def test_a_save_by_that_means_nothing_is_refused():
    for text in ("", "soon", "2h50", "50", "m", "h2", "slurm", "slurm-", "slurm-x", "slurm10m", "2026-13-01"):
        with pytest.raises(UserError, match="save_by=.*must be a duration"):
            deadline(text, 0.0, {"SLURM_JOB_END_TIME": "5000000"})
    for end in ({}, {"SLURM_JOB_END_TIME": "Unknown"}):
        with pytest.raises(UserError, match="SLURM_JOB_END_TIME is (not set|Unknown), outside a job"):
            deadline("slurm-10m", 0.0, end)


@pytest.fixture
def handlers():
    """Signal handlers are as they were after the test."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", STOPPED), ("SIGINT", STOPPED), ("SIGUSR1", REQUEUE)])
def test_signals_are_requests_with_an_exit_code(tmp_path, handlers, number, code):
    stop, run = Stop(), RunDir(tmp_path)
    with pytest.raises(Interrupted) as caught, stop.listening(), run.at_work():
        assert not stop and (tmp_path / "state").read_text() == "running\n"
        os.kill(os.getpid(), getattr(signal, number))
        assert stop
        raise Interrupted("saved")
    assert caught.value.code == code
    assert (tmp_path / "state").read_text() == "stopped\n"


def test_the_second_sigterm_stops_at_once_but_not_after_sigusr1(handlers):
    """Slurm sends SIGTERM some time after the signal that a job asks for; what is being saved then is to be saved."""
    stop = Stop()
    with pytest.raises(Interrupted, match="at once by a second SIGINT") as caught, stop.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert caught.value.code == STOPPED


def test_the_deadline_passes(handlers):
    stop = Stop("1h")
    assert not stop and stop.deadline == pytest.approx(time.time() + 3600, abs=60)
    stop.deadline = time.time()
    assert stop
    with pytest.raises(Interrupted) as caught, stop.listening():
        raise Interrupted("saved")
    assert caught.value.code == REQUEUE


def test_the_state_of_a_run(tmp_path):
    run = RunDir(tmp_path)
    for error, word in ((UserError("bad"), "failed"), (ValueError("worse"), "failed"), (None, "done")):
        try:
            with run.at_work():
                if error:
                    raise error
        except (UserError, ValueError):
            pass
        assert (tmp_path / "state").read_text() == f"{word}\n"
    with run.at_work(writes=False):
        assert (tmp_path / "state").read_text() == "done\n"
