"""Identity-GRPO in JAX."""
