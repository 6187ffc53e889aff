"""Reading runs: samples, groups over seeds, intervals, tests, comparisons, terminal tables."""
