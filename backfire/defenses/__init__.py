"""Defenses: before, during and after fine-tuning."""
