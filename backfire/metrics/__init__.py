"""Metrics: from samples to numbers with intervals."""
