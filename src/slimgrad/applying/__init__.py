"""The room `applying`."""
