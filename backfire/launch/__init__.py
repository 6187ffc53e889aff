"""Running a recipe's jobs on a machine."""
