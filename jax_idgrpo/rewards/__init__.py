"""Score how closely each person in a video resembles the reference photos; higher is better."""

# `rewards.preference` is public API.
from jax_idgrpo.rewards import preference as preference
