"""Name the command that took the place of `python -m jax_idgrpo.pairs_dataset`."""

import sys

if __name__ == "__main__":
    sys.exit("python -m jax_idgrpo.pairs_dataset is now: idgrpo pack-pairs (with the same options)")
