"""Triton kernels, each beside a plain torch twin in the method that uses it; imported only where they are run."""
