"""The vision-language reward."""
