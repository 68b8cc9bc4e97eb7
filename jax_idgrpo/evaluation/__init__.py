"""Sample and score videos, compare adapters, and report on a run."""
