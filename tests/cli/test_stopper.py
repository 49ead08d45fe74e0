"""Signals while Ray's handlers are in their place."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import ray

from baton.cli.processes import signals_kept
from baton.cli.serve import Stopper, StopRequested


@pytest.fixture
def stopper() -> Iterator[Stopper]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield Stopper()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_ends_a_wait_to_come(stopper: Stopper) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stopper.event.is_set()
    with pytest.raises(StopRequested), stopper.waiting():
        pytest.fail("it waits")
    stopper.obey()
    with stopper.waiting():
        pass


def test_an_abort_that_another_handler_has_set_is_called_off(stopper: Stopper) -> None:
    signal.alarm(60)
    os.kill(os.getpid(), signal.SIGTERM)
    assert signal.alarm(0) == 0


def test_handlers_of_others_are_not_let_in(stopper: Stopper) -> None:
    ours = signal.getsignal(signal.SIGTERM)
    with signals_kept():
        ray._private.utils.set_sigterm_handler(lambda number, frame: None)
        assert signal.getsignal(signal.SIGTERM) == ours
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert signal.getsignal(signal.SIGTERM) == ours
    ray._private.utils.set_sigterm_handler(signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
