"""An attack and a metric for backfire."""
