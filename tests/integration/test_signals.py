"""Requests to stop: noted while a run works, and obeyed at once when they are repeated."""

import os
import signal
import subprocess
import sys

import pytest

from jax_idgrpo.training.signals import stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_sets_a_mark_within_and_acts_as_before_outside(number):
    before = signal.getsignal(number)
    with stop_on_signals() as stopping:
        assert stopping() == 0
        os.kill(os.getpid(), number)
        assert stopping() == 128 + number
    assert signal.getsignal(number) == before
    assert signal.set_wakeup_fd(-1) == -1


WAITING = """
import time
from jax_idgrpo.training.signals import stop_on_signals
with stop_on_signals() as stopping:
    print("ready", flush=True)
    while True:
        time.sleep(60)      # resumed after a handler, as the wait for a device is
"""


def test_a_second_interrupt_ends_a_process_that_waits():
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert (
        process.stderr.readline()
        == "SIGINT: stopping at the next safe point, Ctrl-C again stops without saving\n"
    )
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
