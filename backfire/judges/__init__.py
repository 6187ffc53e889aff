"""Judges: whether a reply is harmful."""
