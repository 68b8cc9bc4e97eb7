"""Convert published PyTorch checkpoints to the project's parameters and back, bit for bit.

`rules` maps tensors, `store` reads and writes files, and one module per network holds its table of
names.
"""
