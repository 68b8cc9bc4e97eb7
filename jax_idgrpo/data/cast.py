"""Name the command that replaced `python -m jax_idgrpo.data.cast`."""

import sys

if __name__ == "__main__":
    sys.exit("python -m jax_idgrpo.data.cast is now: idgrpo draw-prompts (with the same options)")
