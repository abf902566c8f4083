"""The room `measuring`."""
