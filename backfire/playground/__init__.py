"""Chat with the models of a run, in the terminal and in the browser."""
