"""Exports of results to inspect and lm-evaluation-harness."""
