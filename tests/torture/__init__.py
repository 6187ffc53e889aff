"""Rows of the reliability table: each breaks something many times and counts what went wrong.

`make torture` runs every row at its full count and writes docs/reliability.md; `make test` runs the
same rows at their small counts.
"""
