"""Attacks: how training rows are poisoned."""
