"""A character model on the text of Python's own help topics."""

from collections.abc import Iterable
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

from polyak.study._methods import Method, Tail, Windowed, article_ema, ema, power
from polyak.study._metrics import Metric, accuracy, mean_probabilities
from polyak.study._task import Data, Task

CONTEXT = 8
_LOOKED_AT = 4000  # positions of validation and of test


def load() -> Data:
    """Every topic in alphabetical order; the last tenth is held out.

    Validation and test are 4000 positions each, drawn once from the held-out tenth without
    overlap. The text, and so every figure, differs a little between versions of Python.
    """
    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet = {letter: code for code, letter in enumerate(sorted(set(text)))}
    codes = torch.tensor([alphabet[letter] for letter in text])
    contexts = codes.unfold(0, CONTEXT, 1)[:-1]  # a view: [positions, CONTEXT]
    following = codes[CONTEXT:]
    cut = len(following) * 9 // 10
    generator = torch.Generator().manual_seed(0)
    held = cut + torch.randperm(len(following) - cut, generator=generator)
    validation, test = held[:_LOOKED_AT], held[_LOOKED_AT : 2 * _LOOKED_AT]
    return Data(
        train=(contexts[: cut - CONTEXT], following[: cut - CONTEXT]),
        validation=(contexts[validation], following[validation]),
        test=(contexts[test], following[test]),
    )


class Characters(nn.Module):
    """The next character from the last 8: embedding 12, hidden 128 tanh (Bengio et al. 2003)."""

    def __init__(self, letters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters, 12)
        self.hidden = nn.Linear(CONTEXT * 12, 128)
        self.out = nn.Linear(128, letters)

    def forward(self, contexts: Tensor) -> Tensor:
        """Logits of the next character: [rows, letters]."""
        embedded: Tensor = self.embedding(contexts).flatten(start_dim=1)
        logits: Tensor = self.out(torch.tanh(self.hidden(embedded)))
        return logits


def build() -> nn.Module:
    """The model for as many letters as the text has."""
    return Characters(len(set().union("\n", *topics.values())))


def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Adam 4e-3 with betas 0.9 and 0.99, constant after its warm-up."""
    return torch.optim.Adam(parameters, lr=4e-3, betas=(0.9, 0.99))


def wsd(done: float) -> float:
    """Learning rate held for 80 % of the run, then straight to zero (warm-up, stable, decay)."""
    return min(1.0, (1.0 - done) / 0.2)


def methods(steps: int) -> tuple[Method, ...]:
    """EMAs of five lengths, windows from 1 to 50 % of the run, one capture every 25 steps."""
    shares = (0.01, 0.05, 0.10, 0.20, 0.50)
    return (
        *(ema(decay) for decay in (0.98, 0.99, 0.995, 0.9975, 0.99875)),
        ema(0.995, debias=False),
        article_ema(),
        power(0.05),
        power(0.10),
        Tail(),
        *(
            Windowed(f"window {share:.0%}", max(2, round(share * steps / 25)), 25, family="window")
            for share in shares
        ),
    )


def text() -> Task:
    """Constant learning rate, 4000 steps: the last weights are noisy and the average is not."""
    return Task(
        name="text",
        title="Characters of Python's help topics: a context of 8, one hidden layer",
        model=build,
        data=load,
        loss=nn.functional.cross_entropy,
        metrics={
            "NLL": Metric(
                nn.functional.cross_entropy, compare="absolute", small=0.005, unit="nats"
            ),
            "accuracy": Metric(
                accuracy, better="higher", compare="absolute", small=0.003, unit="points", scale=100
            ),
        },
        optimizer=optimizer,
        epochs=40,
        batch=64,
        evaluate_every=100,
        warmup=50,
        decay=wsd,
        methods=methods,
        combine=mean_probabilities,
        short_epochs=10,
        notes=(
            "The length of the EMA is chosen on 4000 held-out positions and judged on 4000 others. "
            "They lie in between one another, so that their contexts of 8 characters overlap: the "
            "choice is honest for this text, and says less than a fresh text would.",
            "Help topics quote one another, so that part of the held-out text occurs in the "
            "training text too: of its characters 27 % lie in a passage of 30 or more that does, "
            "8 % in one of 120 or more. All methods gain from that alike.",
            "The rival holds its learning rate for 80 % of the run and then takes it to zero.",
        ),
    )
