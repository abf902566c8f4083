"""Layers and functions whose own memory law is the point; users put them into their own models."""
