"""A Transformer over the bytes of Python's own documentation. Shapes: N windows, T bytes, D the width."""

import functools

import torch
from torch import nn
from torch.nn import functional

VOCABULARY = 128


@functools.cache
def corpus():
    """Bytes of ``pydoc_data.topics``, as integers."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    return torch.tensor([b for b in text.encode("ascii", "replace") if b < VOCABULARY])


class Layer(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_NTD):
        h = self.norms[0](x_NTD)
        heads = (
            project(h).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        attended = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x_NTD = x_NTD + self.out(attended.transpose(1, 2).flatten(2))
        return x_NTD + self.down(functional.gelu(self.up(self.norms[1](x_NTD))))


class LanguageModel(nn.Module):
    def __init__(self, width=96, num_layers=3, length=64, num_heads=4):
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList([Layer(width, num_heads) for _ in range(num_layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, ids_NT):
        x_NTD = self.embed(ids_NT) + self.place.weight[: ids_NT.shape[1]]
        for layer in self.layers:
            x_NTD = layer(x_NTD)
        return self.head(self.norm(x_NTD))


def block_linears(model):
    """Paths of the linear layers in blocks."""
    return [
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("layers")
    ]


def windows(num, length, generator, held_out=False):
    """``num`` windows of ``length`` + 1 bytes; the last tenth of the text is held out."""
    text = corpus()
    cut = len(text) * 9 // 10
    text = text[cut:] if held_out else text[:cut]
    starts = torch.randint(0, len(text) - length - 1, (num,), generator=generator)
    return torch.stack([text[s : s + length + 1] for s in starts.tolist()])


def loss_of(model, batch):
    logits = model(batch[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def train(model, optimizer, steps, num=16, length=64, seed=0):
    """Linear warm-up over a tenth and linear decay to a tenth of the rate; the loss held out afterwards."""
    generator = torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / (0.1 * steps), 1 - 0.9 * t / steps)
    )
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, windows(num, length, generator)).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float(
            loss_of(model, windows(256, length, torch.Generator().manual_seed(9), held_out=True))
        )
