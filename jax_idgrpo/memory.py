"""Memory of the host that XLA's compiler took, given back."""

import ctypes

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"  # the event that JAX records after a program is compiled, before it runs


def give_back_after_compiling(least: float = 1.0) -> None:
    """From now on, what compiling a program took goes back to the system before the program runs.

    XLA frees hundreds of megabytes after a large program, and glibc keeps them: they then lie beside the program's own arrays, at the peak
    of the process. Without glibc nothing is done.

    Args:
      least: seconds of compilation below which it is left, since giving back takes up to a tenth of a second.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return

    def compiled(event: str, seconds: float, **_: str | int) -> None:
        if event == COMPILED and seconds >= least:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(compiled)
