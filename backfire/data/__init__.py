"""Data: reading files, rendering prompts to tokens, poisoning rows, preflight checks."""
