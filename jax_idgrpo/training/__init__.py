"""Train with GRPO or with supervision."""
