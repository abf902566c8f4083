"""Deferred backpropagation: a Gaussian splatting renderer in patches under losses that see the whole image."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimgrad import Ledger
from slimgrad.errors import BatchError, LossError
from slimgrad.methods.activations.deferred_backward import deferred_backward
from slimgrad.types import Column


def gaussians(number, dtype=torch.float64):
    """Means in [0, 1]^2, log scales, rotations, colours and opacities of ``number`` Gaussians, nearest first."""
    torch.manual_seed(0)
    scene = {
        "mean": torch.rand(number, 2),
        "scale": torch.log(0.03 + 0.1 * torch.rand(number, 2)),
        "angle": 3 * torch.rand(number),
        "colour": torch.randn(number, 3),
        "opacity": torch.randn(number),
    }
    return {k: v.to(dtype).requires_grad_() for k, v in scene.items()}


def render(pixels, scene):
    """Colours [3, H, W] at ``pixels`` [H, W, 2]: Gaussians composed from front to back."""
    offset = pixels[..., None, :] - scene["mean"]
    cos, sin = scene["angle"].cos(), scene["angle"].sin()
    x = (offset[..., 0] * cos + offset[..., 1] * sin) / scene["scale"][:, 0].exp()
    y = (offset[..., 1] * cos - offset[..., 0] * sin) / scene["scale"][:, 1].exp()
    alpha = 0.99 * scene["opacity"].sigmoid() * torch.exp(-(x * x + y * y) / 2)
    through = torch.cumprod(1 - alpha, dim=-1)
    weight = alpha * F.pad(through[..., :-1], (1, 0), value=1.0)
    return (weight @ scene["colour"].sigmoid()).permute(2, 0, 1)


def pixels_of(size, dtype=torch.float64):
    axis = (torch.arange(size, dtype=dtype) + 0.5) / size
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1)


def tiled(pixels, size):
    """Square patches, row by row, and what puts them together again."""
    across = pixels.shape[1] // size
    patches = [tile for strip in pixels.split(size) for tile in strip.split(size, dim=1)]

    def assemble(images):
        rows = [torch.cat(images[i : i + across], dim=2) for i in range(0, len(images), across)]
        return torch.cat(rows, dim=1)

    return patches, assemble


def dissimilarity(image, target):
    """1 - SSIM over 11 x 11 windows."""

    def smooth(x):
        return F.avg_pool2d(x, 11, 1)

    mean_a, mean_b = smooth(image), smooth(target)
    var_a = smooth(image * image) - mean_a**2
    var_b = smooth(target * target) - mean_b**2
    both = smooth(image * target) - mean_a * mean_b
    up = (2 * mean_a * mean_b + 1e-4) * (2 * both + 9e-4)
    return 1 - (up / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4))).mean()


def contrast(image, target):
    """Not separable in any way: the Gram matrices of both images' gradients."""

    def gram(x):
        rows = torch.cat([x.diff(dim=1)[:, :, 1:], x.diff(dim=2)[:, 1:]]).flatten(1)
        return rows @ rows.T / rows.shape[1]

    return (gram(image) - gram(target)).norm() / gram(target).norm()


LOSSES = {"ssim": dissimilarity, "gram": contrast}


def target_of(size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(1, 3, 8, 8, generator=generator, dtype=dtype)
    return F.interpolate(coarse, size=(size, size), mode="bilinear")[0]


def assert_equal_to_rounding(scene, expected):
    for name, value in scene.items():
        assert expected[name].abs().max() > 0
        torch.testing.assert_close(value.grad, expected[name], rtol=1e-9, atol=1e-13)


def gradients_and_clear(scene):
    found = {name: value.grad for name, value in scene.items()}
    for value in scene.values():
        value.grad = None
    return found


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("patch", [16, 24, 48])
def test_gradients_are_those_of_the_whole_image(loss, patch):
    scene, pixels, target = gaussians(20), pixels_of(48), target_of(48)
    plain = LOSSES[loss](render(pixels, scene), target)
    plain.backward()
    expected = gradients_and_clear(scene)
    patches, assemble = tiled(pixels, patch)
    found = deferred_backward(
        render, patches, lambda image: LOSSES[loss](image, target), scene, assemble=assemble
    )
    torch.testing.assert_close(found, plain.detach())
    assert not found.requires_grad
    assert_equal_to_rounding(scene, expected)


def test_patches_with_losses_of_their_own_give_another_gradient():
    scene, pixels, target = gaussians(20), pixels_of(48), target_of(48)
    contrast(render(pixels, scene), target).backward()
    expected = gradients_and_clear(scene)
    for tile, wanted in zip(pixels.split(16), target.split(16, dim=1), strict=True):
        (contrast(render(tile, scene), wanted) / 3).backward()
    with pytest.raises(AssertionError):
        assert_equal_to_rounding(scene, expected)


def test_a_256_x_256_image_takes_its_patchs_share_of_the_bytes_and_one_more_rendering():
    scene, pixels = gaussians(48, torch.float32), pixels_of(256, torch.float32)
    target = target_of(256, torch.float32)
    calls = []

    def counted(patch, scene):
        calls.append(patch.shape[0] * patch.shape[1])
        return render(patch, scene)

    def loss_fn(image):
        return dissimilarity(image, target)

    owned = [(Column.WEIGHTS, tensor) for tensor in scene.values()]
    with Ledger(inputs=(pixels, target), owned=owned) as whole:
        loss_fn(counted(pixels, scene)).backward()
    expected = gradients_and_clear(scene)
    patches, assemble = tiled(pixels, 128)
    with Ledger(inputs=(pixels, target), owned=owned) as parts:
        deferred_backward(counted, patches, loss_fn, scene, assemble=assemble)
    ratio = parts.columns[Column.ACTIVATIONS] / whole.columns[Column.ACTIVATIONS]
    print(f"saved bytes: {ratio:.4f} of the whole image's, patches are {1 / 4:.4f} of it")
    assert ratio <= 1.2 / 4
    assert parts.peak_bytes < 0.4 * whole.peak_bytes
    assert sum(calls) == 3 * 256 * 256  # once in the plain step, twice in patches
    for name, value in scene.items():
        error = (value.grad - expected[name]).norm() / expected[name].norm()
        assert error < 1e-4, name


def test_a_network_that_predicts_the_scene_is_run_backward_once():
    pixels, target = pixels_of(24), target_of(24)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 9)).double()
    code, backward_passes = torch.randn(12, 4).double(), []
    network[1].register_full_backward_hook(lambda *_: backward_passes.append(1))

    def predicted():
        made = network(code)
        return {
            "mean": made[:, :2].sigmoid(), "scale": made[:, 2:4] - 2, "angle": made[:, 4],
            "colour": made[:, 5:8], "opacity": made[:, 8],
        }  # fmt: skip

    dissimilarity(render(pixels, predicted()), target).backward()
    expected = [p.grad for p in network.parameters()]
    network.zero_grad()
    backward_passes.clear()
    patches, assemble = tiled(pixels, 8)
    deferred_backward(
        render, patches, lambda i: dissimilarity(i, target), predicted(), assemble=assemble
    )
    assert len(backward_passes) == 1
    for p, g in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-13)


class Field(nn.Module):
    """A field that is asked for points, with noise and a buffer that counts."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, points):
        self.calls += 1
        return self.layers(points) * (1 + self.calls.clone() / 10)


def test_a_module_is_repeated_with_its_noise_and_its_buffers():
    torch.manual_seed(0)
    field, points = Field().double(), pixels_of(12)

    def loss_fn(image):
        return image.std() / image.abs().mean()

    torch.manual_seed(4)
    loss_fn(torch.cat([field(strip) for strip in points.split(5)])).backward()
    expected, after = [p.grad for p in field.parameters()], torch.get_rng_state()
    field.zero_grad()
    for modules, render_field in (((), field), ((field,), lambda strip: field(strip))):
        field.calls.zero_()
        torch.manual_seed(4)
        deferred_backward(render_field, points.split(5), loss_fn, modules=modules)
        assert field.calls == 3
        assert torch.equal(torch.get_rng_state(), after)
        for p, g in zip(field.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12)
        field.zero_grad()


def test_what_cannot_be_is_told():
    scene, pixels = gaussians(3), pixels_of(8)
    with pytest.raises(BatchError, match="no patches"):
        deferred_backward(render, [], torch.sum, scene)
    with pytest.raises(LossError, match="float"):
        deferred_backward(render, [pixels], lambda image: image.detach().sum().item(), scene)
