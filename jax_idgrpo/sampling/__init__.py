"""From a checkpoint and prompts to videos."""
