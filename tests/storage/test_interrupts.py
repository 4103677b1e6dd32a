"""Ctrl-C at any step of a write: finished cycles are kept, and nothing is left behind."""

import contextlib
import signal
import threading

import pytest
from benchmarks.interrupts import Interrupted, interrupted_runs, uninterrupted_steps

from snapshot_ensemble.storage.interrupts import interrupts_deferred


@contextlib.contextmanager
def handling(number, handler):
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def interrupted_block(done, error=None):
    with interrupts_deferred():
        with interrupts_deferred():
            signal.raise_signal(signal.SIGINT)
            done.append("inner")
        done.append("outer")
        if error is not None:
            raise error
    done.append("after")


@pytest.mark.parametrize("error", [None, KeyError("lost")])
def test_an_interrupt_is_raised_after_the_block(error):
    done = []
    with handling(signal.SIGINT, signal.default_int_handler):
        with pytest.raises(KeyboardInterrupt) as caught:
            interrupted_block(done, error)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert done == ["inner", "outer"]
    assert caught.value.__context__ is error


def test_a_handler_of_sigterm_is_called_after_the_block():
    calls = []
    with handling(signal.SIGTERM, lambda *args: calls.append(len(done))):
        done = []
        with interrupts_deferred():
            signal.raise_signal(signal.SIGTERM)
            done.append(1)
        assert calls == [1]


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_handlers_that_are_not_python_stay(handler):
    with handling(signal.SIGINT, handler):
        with interrupts_deferred():
            assert signal.getsignal(signal.SIGINT) is handler
        assert signal.getsignal(signal.SIGINT) is handler


def test_in_another_thread_nothing_changes():
    seen = []

    def block():
        with interrupts_deferred():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=block)
    before = signal.getsignal(signal.SIGINT)
    thread.start()
    thread.join()
    assert seen == [before]


# Python may drop an exception, also Ctrl-C, in the callback of a weak reference.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("share", [pytest.param(6, marks=pytest.mark.slow), 28])
def test_ctrl_c_at_each_step(tmp_path, share):
    steps = uninterrupted_steps(tmp_path / "steps")
    assert len(steps) > 60
    assert set(steps) >= {"write", "flush", "rename", "remove", "unlock", "weights"}
    chosen = range(len(steps) - 1, 0, -share)  # From the last one, which unlocks.
    assert interrupted_runs(tmp_path, chosen) == [Interrupted(step, []) for step in chosen]
