"""The four models whose averages are timed: sizes and nesting as people train them.

They have parameters and no buffers, since some libraries average buffers and some do not.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

PIECE = 2**20


def mlp() -> nn.Module:
    """A small regression network: 6 tensors, 3.5k elements."""
    return nn.Sequential(
        nn.Linear(16, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 8)
    )


def tiny() -> nn.Module:
    """Many small layers, as of adapters: 1,000 tensors, 36k elements."""
    return nn.ModuleList(nn.Linear(8, 8) for _ in range(500))


class Bottleneck(nn.Module):
    """The block of ResNet-50, of which only the parameters count here."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.norm1 = nn.Conv2d(inputs, width, 1, bias=False), norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.norm2 = norm(width)
        self.conv3, self.norm3 = nn.Conv2d(width, outputs, 1, bias=False), norm(outputs)
        if inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs)
            )


def norm(width: int) -> nn.Module:
    """BatchNorm without its statistics."""
    return nn.BatchNorm2d(width, track_running_stats=False)


def resnet() -> nn.Module:
    """ResNet-50 (He et al. 2015) without the last bias: 160 tensors, 25.5M elements."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), norm(64)]
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            width = 64 * 2**stage
            layers.append(Bottleneck(inputs, width, 2 if stage and not block else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.Linear(inputs, 1000, bias=False))


class Block(nn.Module):
    """One layer of GPT-2: 12 tensors."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend to what came before, then to oneself."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.ln_1(x)).chunk(3, dim=-1)
        )
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(seen.transpose(1, 2).flatten(-2))
        deep: Tensor = x + self.down(F.gelu(self.up(self.ln_2(x))))
        return deep


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019), the output tied to the embedding by use, not as a second name.

    Args:
        width, layers, heads: 768, 12 and 12 are the small one.
        words: in the vocabulary.
        length: of the longest text.
    """

    def __init__(
        self,
        *,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        words: int = 50257,
        length: int = 1024,
    ) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)

    def forward(self, text: Tensor) -> Tensor:
        """The mean loss of predicting each word from those before."""
        x = self.wte(text) + self.wpe.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        scores = F.linear(self.ln_f(x)[:, :-1], self.wte.weight)
        return F.cross_entropy(scores.flatten(0, 1), text[:, 1:].flatten())


def gpt() -> nn.Module:
    """GPT-2 small: 148 tensors, 124M elements."""
    return GPT()


def short_gpt() -> nn.Module:
    """The same in small, for a smoke test: 28 tensors, 0.2M elements."""
    return GPT(width=64, layers=2, heads=2, words=1000, length=64)


def build(make: Callable[[], nn.Module], dtype: torch.dtype, device: str) -> nn.Module:
    """A model in fresh memory, with weights like those of a trained one.

    Drawing 124M normal numbers takes seconds: one block of them is laid end to end.
    """
    with torch.device("meta"):
        model = make()
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator().manual_seed(0)
    block = (0.02 * torch.randn(PIECE, generator=generator)).to(device=device, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            for piece in parameter.view(-1).split(PIECE):
                piece.copy_(block[: piece.numel()])
    return model
