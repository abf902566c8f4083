"""Tokens to be copied or reversed, as the first token says; a tagger with streams, and a plain Transformer. W: the width."""

import torch
from torch import nn
from torch.nn import functional

from slimgrad.layers.sequence_operations import SelfAttention

WIDTH, LENGTH, VOCABULARY = 32, 10, 12


def batches(number, seed, size=32):
    """(ids of 1 + LENGTH tokens, targets of LENGTH tokens): the first token is 0 for a copy, 1 for the reverse."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        x = torch.randint(2, VOCABULARY, (size, LENGTH), generator=generator)
        is_reverse = torch.randint(2, (size, 1), generator=generator)
        yield torch.cat([is_reverse, x], 1), torch.where(is_reverse.bool(), x.flip(1), x)


class Tagger(nn.Module):
    """Token and place embeddings, a body, a head. ``num_streams`` are the splits that the body takes and returns."""

    def __init__(self, body, num_streams):
        super().__init__()
        width = num_streams * WIDTH
        self.body, self.num_streams = body, num_streams
        self.tokens, self.places = (
            nn.Embedding(VOCABULARY, width),
            nn.Embedding(LENGTH + 1, width),
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, ids):
        x = self.tokens(ids) + self.places.weight
        streams = self.body(x.chunk(self.num_streams, -1))
        return self.head(self.norm(torch.cat(streams, -1)))[:, 1:]


class PlainTransformer(nn.Module):
    """Layers of attention and feed-forward network on one stream."""

    def __init__(self, num_layers, inner):
        super().__init__()
        self.layers = nn.Sequential()
        for _ in range(num_layers):
            feed_forward = nn.Sequential(
                nn.LayerNorm(WIDTH), nn.Linear(WIDTH, inner), nn.GELU(), nn.Linear(inner, WIDTH)
            )
            self.layers += nn.Sequential(SelfAttention(WIDTH, 4), feed_forward)

    def forward(self, streams):
        (x,) = streams
        for layer in self.layers:
            x = x + layer(x)
        return (x,)


def loss_fn(model, batch):
    ids, targets = batch
    return functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten())


def trained_loss(model, seed, num_steps=250, rate=3e-3):
    """The mean loss on batches not trained on."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for batch in batches(num_steps, seed):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    with torch.no_grad():
        return sum(float(loss_fn(model, batch)) for batch in batches(10, 999)) / 10
