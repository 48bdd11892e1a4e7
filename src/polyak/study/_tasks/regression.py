"""The article's experiment: a small network with dropout on synthetic regression data.

Settings as published, `ema-pytorch` replaced by the schedule that it computes.
"""

from collections.abc import Iterable

import torch
from sklearn.datasets import make_regression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from polyak.study._methods import ARTICLE, Method, Tail, Windowed, article_ema, ema, power
from polyak.study._metrics import Metric, r2, refitted
from polyak.study._task import Data, Published, Task


def load() -> Data:
    """2000 rows, 20 features; inputs and target standardised, THEN split 80 to 20."""
    rows, targets = make_regression(n_samples=2000, n_features=20, noise=0.1, random_state=42)
    inputs = StandardScaler().fit_transform(rows)
    scaled = StandardScaler().fit_transform(targets[:, None])
    split = train_test_split(inputs, scaled, test_size=0.2, random_state=42)
    train, held, train_y, held_y = (torch.tensor(part, dtype=torch.float32) for part in split)
    return Data(train=(train, train_y), validation=(held, held_y))


def build() -> nn.Module:
    """20-64-32-1 with ReLU and dropout 0.2; Xavier-normal weights, zero biases."""
    layers = [nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.2)]
    layers += [nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 1)]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Adam 1e-3 with weight decay 1e-5."""
    return torch.optim.Adam(parameters, lr=1e-3, weight_decay=1e-5)


def plateau(optimizer: torch.optim.Optimizer) -> ReduceLROnPlateau:
    """Halve the learning rate after 10 epochs without a better watched value."""
    return ReduceLROnPlateau(optimizer, factor=0.5, patience=10)


def methods(steps: int) -> tuple[Method, ...]:
    """The article's average, other lengths of it, and other kinds.

    500 epochs are planned and some 90 are run, so that lengths are named in steps (50 an epoch).
    """
    return (
        article_ema(),
        ema(0.9),
        ema(0.99),
        ema(0.997),
        ema(0.999),
        ema(0.999, debias=False),
        power(0.05),
        power(0.10),
        Tail(),
        Windowed("window of 10 epochs", k=20, every=25),
    )


def regression() -> Task:
    """The task as the article describes it."""
    return Task(
        name="regression",
        title="The article's experiment: a 20-64-32-1 network with dropout, synthetic regression",
        model=build,
        data=load,
        loss=nn.functional.mse_loss,
        metrics={
            "MSE": Metric(nn.functional.mse_loss),
            "MSE refitted": Metric(refitted),
            "MAE": Metric(nn.functional.l1_loss),
            "R2": Metric(r2, better="higher", compare="absolute", small=0.0),
        },
        optimizer=optimizer,
        epochs=500,
        batch=32,
        patience=20,
        watch=ARTICLE,
        scheduler=plateau,
        methods=methods,
        headline=ARTICLE,
        control=True,
        short_epochs=60,
        notes=(
            "As in the article there is no test part: the 400 rows that stop the run and pick the "
            "epochs also judge them. Whether that flatters is measured: the cross-fit picks each "
            "epoch on half of the rows and judges it on the other half. The common stop is that of "
            "the averaged curve (20 epochs after its best), as in the article.",
            "Dropout shrinks the outputs, and by a little more or less each epoch: a bias that an "
            "average holds still and cannot remove. 'MSE refitted' is what remains of the MSE once "
            "a straight line from the outputs to the targets has been taken out.",
            "As in the article both scalers saw all rows before the split, and the learning rate "
            "follows the validation loss of the averaged model, for the live weights too.",
        ),
        published=Published(
            source="the article, one seed",
            average=ARTICLE,
            stop=97,
            spread=(0.0023, 0.0015),
            values={"MSE": (0.0055, 0.0044), "MAE": (0.0581, 0.0526), "R2": (0.9946, 0.9957)},
            note="Which epochs the article's standard deviation covers is not said: over the whole "
            "curve the first descent decides it, after the first third the noise does.",
        ),
    )
