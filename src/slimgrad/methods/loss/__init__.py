"""The room `methods/loss`."""
