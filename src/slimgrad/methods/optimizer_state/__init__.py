"""The room `methods/optimizer_state`."""
