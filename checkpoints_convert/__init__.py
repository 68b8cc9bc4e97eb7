"""Published PyTorch checkpoints to the project's parameters and back, bit for bit.

`rules` is the mechanism, `store` the files, and one module per network holds its table of names.
"""
