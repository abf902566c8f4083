"""The handwritten digits that come with scikit-learn: 1,797 images of 8x8 pixels. Shapes: N images, D = 64 pixels."""

import functools

import pytest
import torch


@functools.cache
def digits(dtype=torch.float64):
    """Images (N, 64) with pixels in [-1, 1], and labels (N,). Skips the test where scikit-learn is not installed."""
    datasets = pytest.importorskip("sklearn.datasets")
    found = datasets.load_digits()
    return torch.tensor(found.data / 8 - 1, dtype=dtype), torch.tensor(found.target)
