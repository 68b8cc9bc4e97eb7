"""Synthetic people: rendering, captions, and training of the bundled models."""
