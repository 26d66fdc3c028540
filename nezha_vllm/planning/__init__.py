"""How many GPUs a given traffic takes: from measured rows and a queueing simulation fitted to them."""
