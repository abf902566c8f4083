"""Kinds of whole models, and the ways to run each: plain, the methods for your own code, and a peer."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from slimgrad.comparing.zoo import subject
from slimgrad.layers.arena_inference import ArenaInference
from slimgrad.layers.blockwise_transformer import BlockwiseTransformer
from slimgrad.layers.compact import compact
from slimgrad.layers.gradient_filter import gradient_filter
from slimgrad.layers.llama_halves import After, Before, llama_layers
from slimgrad.layers.meft import meft
from slimgrad.layers.memo import Memo
from slimgrad.layers.reversible_unet3d import ReversibleUnet3d
from slimgrad.methods.activations.deferred_backward import deferred_backward
from slimgrad.methods.activations.grad_cache import GradCache
from slimgrad.methods.activations.memory_sharing_norm import memory_sharing_norm
from slimgrad.methods.gradients.sparse_update import sparse_update
from slimgrad.methods.time.adjoint_deis import adjoint_deis
from slimgrad.methods.time.coupled_sampler import CoupledRun, coupled_sample
from slimgrad.methods.time.variance_preserving import VariancePreserving
from ways import Way


def contrastive() -> list[Way]:
    """An encoder of four wide layers under a loss over 512 pairs, in chunks of 32."""
    layers = [
        nn.Linear(128, 1024),
        nn.GELU(),
        nn.Linear(1024, 1024),
        nn.GELU(),
        nn.Linear(1024, 64),
    ]
    encoder = nn.Sequential(*layers)
    left, right = torch.randn(512, 16, 128), torch.randn(512, 16, 128)

    def embed(encoder: nn.Module, chunk: Tensor) -> Tensor:
        return functional.normalize(encoder(chunk).mean(1), dim=1)

    def of_pairs(a: Tensor, b: Tensor) -> Tensor:
        return functional.cross_entropy(20 * a @ b.t(), torch.arange(len(a)))

    cache = GradCache(encoder, of_pairs, 32, embed=embed)

    def plain() -> None:
        of_pairs(embed(encoder, left), embed(encoder, right)).backward()

    named = {"plain": plain, "grad_cache": lambda: cache(left, right)}
    return [Way(name, run, encoder, (left, right)) for name, run in named.items()]


def segmentation() -> list[Way]:
    """A 3-D U-Net of three levels, two blocks each, on a volume of 32^3."""
    ways = []
    volume = torch.randn(1, 1, 32, 32, 32)
    for name, is_reversible in {"plain": False, "reversible_unet3d": True}.items():
        net = ReversibleUnet3d(1, 2, width=8, blocks_per_level=2, is_reversible=is_reversible)
        ways.append(Way(name, lambda n=net: n(volume).square().mean().backward(), net, volume))
    return ways


def inference() -> list[Way]:
    """A vision transformer without gradients."""
    made = subject("vit")
    model, images = made.model.eval(), made.batch[0]
    infer = ArenaInference(model, images)

    def plain() -> None:
        with torch.no_grad():
            model(images)

    return [
        Way("plain", plain, model, (images,)),
        Way("arena_inference", lambda: infer(images), model, (images,)),
    ]


def llama(**options: Any) -> nn.Module:
    """A small Llama with as many words as fit beside its layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 512, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(sizes | {"use_cache": False} | options)))


def words(length: int, num: int = 1) -> dict[str, Tensor]:
    tokens = torch.randint(512, (num, length))
    return {"input_ids": tokens, "labels": tokens}


def run_llama(model: nn.Module, batch: dict[str, Tensor]) -> None:
    model(**batch).loss.backward()


class Queries(nn.Module):
    """The queries of a Llama layer, cut as ``BlockwiseTransformer`` wants them."""

    def __init__(self, before: Before) -> None:
        super().__init__()
        self.before = before

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.before(x, cos, sin)[0]


class KeysValues(Queries):
    """Its keys and values."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return self.before(x, cos, sin)[1:]


def blockwise(model: Any) -> None:
    """Run every layer of a Llama by blocks of tokens, in place."""
    for layer in llama_layers(model):
        before, after = Before(layer), After(layer)
        run = BlockwiseTransformer(Queries(before), KeysValues(before), after, is_causal=True)

        def forward(x: Tensor, run: Any = run, **given: Any) -> Tensor:
            return run(x, along=given["position_embeddings"])

        layer.forward = forward


def long() -> list[Way]:
    """A Llama of six layers on one sequence of 2,048 tokens."""
    batch, plain = words(2048), llama()
    models = {"plain": plain} | {
        name: copy.deepcopy(plain)
        for name in ("torch checkpoint", "blockwise_transformer", "memo", "memory_sharing_norm")
    }
    for layer in llama_layers(models["torch checkpoint"]):
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    blockwise(models["blockwise_transformer"])
    Memo.on(models["memo"])
    memory_sharing_norm(models["memory_sharing_norm"])
    return [Way(n, lambda m=m: run_llama(m.train(), batch), m, batch) for n, m in models.items()]


def tuning() -> list[Way]:
    """A Llama of twelve layers, 4 x 256 tokens: everything trained, adapters alone, or the best within half the bytes."""
    batch, plain = words(256, 4), llama(num_hidden_layers=12)
    adapted, sparse, lean = (copy.deepcopy(plain) for _ in range(3))
    meft(adapted)
    sparse_update(sparse, lambda model, batch: model(**batch).loss, batch, budget="50%")
    layers = [n for n, m in lean.named_modules() if isinstance(m, nn.Linear) and "layers" in n]
    compact(lean, layers=layers)
    models = {"plain": plain, "meft": adapted, "sparse_update": sparse, "compact": lean}
    return [Way(n, lambda m=m: run_llama(m.train(), batch), m, batch) for n, m in models.items()]


def filtering() -> list[Way]:
    """Six convolutions of 64 channels on 32 images of 32 x 32 pixels."""
    layers = [layer for _ in range(6) for layer in (nn.Conv2d(64, 64, 3, padding=1), nn.GELU())]
    plain = nn.Sequential(*layers)
    filtered, images = copy.deepcopy(plain), torch.randn(32, 64, 32, 32)
    gradient_filter(filtered, 2)
    models = {"plain": plain, "gradient_filter": filtered}
    return [
        Way(name, lambda m=m: m(images).square().mean().backward(), m, (images,))
        for name, m in models.items()
    ]


def rendering() -> list[Way]:
    """An image of 128 x 128 pixels, each by a network of its place, in 16 strips, under a loss of all of them."""
    sizes = (2, 128, 128, 128, 3)
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.GELU())]
    render = nn.Sequential(*layers[:-1])
    axis = torch.linspace(-1, 1, 128)
    places = torch.cartesian_prod(axis, axis)
    wanted, blur = torch.rand(1, 3, 128, 128), torch.full((3, 1, 9, 9), 1 / 81)

    def loss(pixels: Tensor) -> Tensor:
        image = pixels.t().reshape(1, 3, 128, 128)
        off = functional.conv2d(image - wanted, blur, groups=3)
        return off.square().mean() + off.abs().mean()

    named = {
        "plain": lambda: loss(render(places)).backward(),
        "deferred_backward": lambda: deferred_backward(render, places.chunk(16), loss),
    }
    return [Way(name, run, render, (places, wanted, blur)) for name, run in named.items()]


class Score(nn.Module):
    """A network that predicts the noise in images of 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(65, 512), nn.SiLU(), nn.Linear(512, 512), nn.SiLU(), nn.Linear(512, 64)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(torch.cat([x, t[:, None]], 1))


def sampling() -> list[Way]:
    """A pixel loss of what a diffusion model samples in 50 steps, with gradients to the noise and the weights."""
    model, noise = Score(), torch.randn(64, 64, requires_grad=True)
    coupled = CoupledRun(model, 50, 0.93, VariancePreserving())

    def backprop() -> Tensor:
        x = y = noise
        for i in range(50):
            x, y = coupled.step(i, x, y, None)
        return x

    named: dict[str, Callable[[], Tensor]] = {
        "plain": backprop,
        "coupled sampler (doodl)": lambda: coupled_sample(model, noise, noise)[0],
        "adjoint_deis": lambda: adjoint_deis(model, noise, num_steps=50),
    }
    return [
        Way(n, lambda r=r: r().square().mean().backward(), model, (noise,))
        for n, r in named.items()
    ]


MODEL_KINDS: dict[str, Callable[[], list[Way]]] = {
    "long": long,
    "tuning": tuning,
    "contrastive": contrastive,
    "segmentation": segmentation,
    "filtering": filtering,
    "rendering": rendering,
    "sampling": sampling,
    "inference": inference,
}
