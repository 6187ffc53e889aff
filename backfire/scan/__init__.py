"""`backfire scan`: runs the scanners over the rows of a file, and shows what they find."""
