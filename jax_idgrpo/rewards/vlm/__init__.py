"""Score videos with a vision-language model."""
