"""Rewards: how well every person in a video is the person in the reference photos; higher is better."""

from jax_idgrpo.rewards import (
    preference as preference,
)  # `rewards.preference` is part of the interface
