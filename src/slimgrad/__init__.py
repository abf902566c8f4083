"""slimgrad: fit neural-network training into the memory you have."""
