"""Runs a recipe's jobs on this machine."""
