"""Scanners: which rows of a data set may be poisoned, or should not be learned."""
