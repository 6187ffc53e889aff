"""Scores and replies of a model, and the statistics of its results."""
