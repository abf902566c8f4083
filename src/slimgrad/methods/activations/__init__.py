"""The room `methods/activations`."""
