"""The room `verifying`."""
