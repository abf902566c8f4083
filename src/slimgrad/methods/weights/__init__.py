"""Methods about the weights themselves: how they lie in memory."""
