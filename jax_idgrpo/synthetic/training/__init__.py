"""Supervised tasks that train the bundled models on synthetic people."""
