"""`python -m jax_idgrpo` is `idgrpo`."""

from jax_idgrpo.cli import main

main()
