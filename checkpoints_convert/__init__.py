"""Rule tables between published PyTorch checkpoints and the project's parameters."""
