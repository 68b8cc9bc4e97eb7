"""Name the command that took the place of `python -m jax_idgrpo.pairs`."""

import sys

if __name__ == "__main__":
    sys.exit("python -m jax_idgrpo.pairs is now: idgrpo pairs (with the same options)")
