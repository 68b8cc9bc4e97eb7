"""Sample videos from a checkpoint and prompts."""
