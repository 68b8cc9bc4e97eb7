"""Open the socket of a command that serves HTTP, on this machine unless told otherwise."""

import importlib
import ipaddress
import os
import socket
import sys
from types import FrameType

from jax_idgrpo.errors import UserError


def require_packages(command: str) -> None:
    """Check that Starlette and uvicorn are installed.

    Raises:
      UserError: one is missing. The message begins with `command`.
    """
    try:
        for name in ("starlette", "uvicorn"):
            importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{command} needs {error.name}, which is not installed; pip install 'jax-idgrpo[serve]'"
        ) from None


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket, with a warning if other machines can reach it.

    Args:
      host: address or name of this machine.
      port: port; 0 takes a free one.

    Raises:
      UserError: the address cannot be used.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: is no port; use 1 to 65535, or 0 for a free one")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        opened = socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        number = error.errno or 0  # that of an unknown name is negative
        reason = os.strerror(number) if number > 0 else error.strerror or error
        raise UserError(
            f"--host {host} --port {port}: cannot listen there ({reason}); use another port, or "
            "end the program that has it"
        ) from None
    if not ipaddress.ip_address(opened.getsockname()[0]).is_loopback:
        print(
            f"idgrpo: warning: {address_of(opened)} can be reached from other machines, and anyone "
            "there may use it",
            file=sys.stderr,
        )
    return opened


def address_of(opened: socket.socket) -> str:
    """Return the address of a listening socket, as http://HOST:PORT."""
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def leave(number: int, frame: FrameType | None) -> None:
    """Exit on a signal so that temporary folders are removed; a handler for `signal.signal`."""
    sys.exit(128 + number)
