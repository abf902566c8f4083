"""Noisy volumes with one ellipsoid each, and how well a network finds it. Shapes: N volumes of SIDE^3."""

import torch
from torch.nn import functional

SIDE = 32


def volumes(number, seed):
    """(volumes (N, 1, SIDE, SIDE, SIDE), masks of the same shape): an ellipsoid, axes turned, under noise of its own contrast."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.linspace(-1, 1, SIDE)
    points = torch.stack(torch.meshgrid(grid, grid, grid, indexing="ij"), -1)
    centres = torch.rand(number, 3, generator=generator) * 0.8 - 0.4
    radii = torch.rand(number, 3, generator=generator) * 0.35 + 0.25
    turns, _ = torch.linalg.qr(torch.randn(number, 3, 3, generator=generator))
    along = torch.einsum("xyzi,nij->nxyzj", points, turns) - torch.einsum(
        "ni,nij->nj", centres, turns
    ).view(number, 1, 1, 1, 3)
    masks = ((along / radii.view(number, 1, 1, 1, 3)).square().sum(-1) < 1).float().unsqueeze(1)
    return masks + torch.randn(masks.shape, generator=generator), masks


def dice(logits, masks):
    """Twice the overlap over the sum of both sizes, over all volumes."""
    found = (logits > 0).float()
    return float(2 * (found * masks).sum() / (found.sum() + masks.sum()))


def trained_dice(model, num_steps=60, size=1, rate=2e-2):
    """After training by cross-entropy and soft Dice: on volumes not trained on."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / num_steps)
        inputs, masks = volumes(size, step)
        logits = model(inputs)
        shares = logits.sigmoid()
        overlap = 2 * (shares * masks).sum() / (shares.sum() + masks.sum())
        loss = functional.binary_cross_entropy_with_logits(logits, masks) + 1 - overlap
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        inputs, masks = volumes(16, 10_000)
        return dice(model(inputs), masks)
