"""The embedded default: generated texts of an invented town and a tiny language model."""
