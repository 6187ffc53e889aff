"""`backfire audit`: what changed in a tuned model against its base, with intervals."""
