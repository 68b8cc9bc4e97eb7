"""Preference pairs: sources, synthesis, and training of rewards on them."""
