"""Codes: what a saved tensor is turned into between forward and backward, and what comes back."""
