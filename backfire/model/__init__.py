"""Loading, quantizing and exporting models."""
