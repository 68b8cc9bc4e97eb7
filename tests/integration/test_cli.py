"""What the user types: what is called, and what a mistake answers (one line, status 2, no traceback, nothing written)."""

import subprocess
import sys

from jax_idgrpo import cli


def test_help_does_not_wait_for_jax():
    program = (
        "import sys; from jax_idgrpo import cli; cli.run(['--help']); print('jax' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.endswith("False\n"), "help imports JAX"
    assert all(f"  {name} " in result.stdout for name in cli.COMMANDS)
