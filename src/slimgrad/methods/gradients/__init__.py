"""The room `methods/gradients`."""
