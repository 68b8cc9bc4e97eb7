"""Scores of videos, comparisons of adapters, and the report of a run."""
