"""Compares slimgrad with other ways to train in less memory, alternately in one run, on models of several kinds."""
