"""Stop a run on SIGTERM (sent by schedulers), SIGHUP (lost terminal) or Ctrl-C."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

TERMINATED = 128 + signal.SIGTERM
"""Exit status after SIGTERM. As in a shell, it is 128 plus the signal's number."""


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Callable[[], int]]:
    """Defer `SIGNALS` inside the context; a second Ctrl-C exits at once with status 130.

    Enter the context in the main thread. A separate thread reads the signals, so a second Ctrl-C
    works even while the main thread waits for a device or a compiler.

    Yields:
      A function that returns the exit status for the first received signal, or 0 if there was none.
      The caller should save and exit with this status.
    """
    received: list[int] = []
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def read() -> None:
        interrupts = 0
        while numbers := os.read(reading, 16):
            for number in numbers:
                if number not in SIGNALS:
                    continue
                interrupts += number == signal.SIGINT
                if interrupts > 1:
                    _end_now()
                how = ", Ctrl-C again stops without saving" if number == signal.SIGINT else ""
                print(
                    f"{signal.Signals(number).name}: stopping at the next safe point{how}",
                    file=sys.stderr,
                    flush=True,
                )
        os.close(reading)

    before = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in SIGNALS
    }
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=read, name="signals", daemon=True).start()
    try:
        yield lambda: 128 + received[0] if received else 0
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writing)


def _end_now() -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h\n")  # the progress bar hides the cursor
        sys.stderr.flush()
    os._exit(128 + signal.SIGINT)
