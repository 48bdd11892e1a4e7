"""Handwritten digits and a small convolutional network: averages beside batch normalisation."""

from collections.abc import Iterable

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from polyak.study._methods import Method, Tail, article_ema, ema, power, window
from polyak.study._metrics import Metric, accuracy, mean_probabilities
from polyak.study._task import Data, Task


def load() -> Data:
    """1797 images of 8 by 8: 40 % test, a fifth of the rest validation, pixels / 16 - 0.3."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16.0 - 0.3
    labels = torch.tensor(bunch.target, dtype=torch.long)
    rows = list(range(len(labels)))
    rest, test = train_test_split(rows, test_size=0.4, random_state=0, stratify=labels)
    train, held = train_test_split(rest, test_size=0.2, random_state=0, stratify=labels[rest])
    return Data(
        train=(images[train], labels[train]),
        validation=(images[held], labels[held]),
        test=(images[test], labels[test]),
    )


def build() -> nn.Module:
    """Two convolutions with BatchNorm, one linear layer: 10 000 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD 0.05 with momentum 0.9, constant: a rate that never settles."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def methods(steps: int) -> tuple[Method, ...]:
    """EMAs of several lengths, two of them with their statistics computed anew too."""
    return (
        ema(0.9),
        ema(0.98),
        ema(0.99, refresh=True),
        ema(0.998, refresh=True),
        ema(0.9995),
        ema(0.99, debias=False),
        article_ema(),
        power(0.05),
        power(0.10),
        Tail(),
        window(0.10, steps=steps),
    )


def digits() -> Task:
    """A network that soon knows its training data: is there noise left to average away?"""
    return Task(
        name="digits",
        title="scikit-learn's digits: a small convolutional network with BatchNorm",
        model=build,
        data=load,
        loss=nn.functional.cross_entropy,
        metrics={
            "NLL": Metric(nn.functional.cross_entropy),
            "accuracy": Metric(
                accuracy, better="higher", compare="absolute", small=0.003, unit="points", scale=100
            ),
        },
        optimizer=optimizer,
        epochs=40,
        batch=32,
        methods=methods,
        combine=mean_probabilities,
        short_epochs=12,
        notes=(
            "BatchNorm: the running statistics are averaged like the weights; rows that end in "
            "'refreshed' compute them anew from the training images under the averaged weights.",
            "719 test images: one image is 0.14 points of accuracy.",
        ),
    )
