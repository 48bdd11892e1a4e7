"""Recompute the statistics of normalisation layers for the weights they will be used with."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ._checks import is_count
from ._errors import ArgumentError
from ._roles import walk

Forward = Callable[[nn.Module, Any], object]


@torch.no_grad()
def recompute(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    limit: int | None = None,
) -> tuple[int, dict[str, Tensor]]:
    """Set running means and variances to those of all values seen in `batches`, pooled exactly.

    mean = sum n_b mean_b / N,  var = (sum (n_b - 1) var_b + n_b (mean_b - mean)^2) / (N - 1),
    over batches b of n_b values a channel, summed in float64 (Chan, Golub and LeVeque 1983).

    Only the normalisation layers are put in training mode, so dropout is off as it is in
    evaluation. Layers that were set to evaluation in a model that trains are taken to be frozen on
    purpose. What the statistics were before does not matter. Modes and momenta come back whatever
    happens, and so do the statistics when anything fails.

    Returns:
        How many batches were used, and the new statistics by canonical name.
    """
    if limit is not None and not is_count(limit):
        raise ArgumentError(f"limit must be at least 1 batch, a whole number, got {limit!r}.")
    if isinstance(batches, Tensor):  # its rows would pass for batches
        raise ArgumentError("batches must be several, got one Tensor. Pass a loader, or [tensor].")
    call = forward or _plain_forward
    layers = [_Layer(prefix, norm) for prefix, norm in _layers(model)]
    if not layers:
        raise ArgumentError(
            "the model must have batch normalisation with running statistics that is not frozen "
            "(in evaluation mode while the model trains), got none. There is nothing to refresh."
        )
    with _recording(model, layers):
        used = 0
        for batch in islice(batches, limit):
            call(model, batch)
            used += 1
        if used == 0:
            raise ArgumentError("batches must yield at least one batch, got none.")
        unseen = [layer.prefix for layer in layers if layer.count == 0]
        if unseen:
            raise ArgumentError(
                f"every normalisation layer must see data, got nothing for {unseen[:3]}. "
                "Pass forward= so that the whole model runs."
            )
        statistics = {n: t for layer in layers for n, t in layer.statistics().items()}
    for layer in layers:
        layer.write()
    return used, statistics


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    found: dict[int, tuple[str, nn.Module]] = {}
    for prefix, module in walk(model):
        tracks = isinstance(module, _BatchNorm) and module.running_mean is not None
        if tracks and id(module) not in found:
            found[id(module)] = (prefix, module)
    return [(p, m) for p, m in found.values() if m.training or not model.training]


def _plain_forward(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor):
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise ArgumentError(
            "batches must yield tensors, or tuples that start with one, got "
            f"{type(batch).__name__}. Pass forward=lambda model, batch: model(**batch) or the like."
        )
    model(batch)


class _Layer:
    """One layer: its modes before, and the pooled moments of what it sees."""

    def __init__(self, prefix: str, norm: nn.Module) -> None:
        assert isinstance(norm, _BatchNorm)
        self.prefix, self.norm = prefix, norm
        self.momentum = norm.momentum
        assert isinstance(norm.running_mean, Tensor)
        assert isinstance(norm.running_var, Tensor)
        self.kept = (norm.running_mean.clone(), norm.running_var.clone())
        counter = norm.num_batches_tracked
        self.counter = counter.clone() if isinstance(counter, Tensor) else None
        self.count = self.batch = 0
        self.mean = torch.zeros_like(norm.running_mean, dtype=torch.float64)
        self.squares = self.mean.clone()  # sum of squared deviations from the mean

    def count_values(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the layer runs: count the values a channel, of which a variance needs two."""
        values = args[0] if args else kwargs["input"]
        self.batch = values.numel() // values.shape[1]
        if self.batch < 2:
            raise ArgumentError(
                f"batches must hold at least 2 values a channel, got {self.batch} in "
                f"{self.prefix.rstrip('.') or 'the model'!r}. Load the data with drop_last=True."
            )

    def see(self, norm: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Pool in the batch that the layer has just normalised.

        With momentum 1 the running statistics ARE those of the batch, synchronised over ranks
        where the layer does that.
        """
        n = self.batch
        mean, var = self.norm.running_mean, self.norm.running_var
        assert isinstance(mean, Tensor)
        assert isinstance(var, Tensor)
        mean, var = mean.to(torch.float64), var.to(torch.float64)
        total = self.count + n
        shift = mean - self.mean
        self.mean = self.mean + shift * (n / total)
        self.squares = self.squares + var * (n - 1) + shift**2 * (self.count * n / total)
        self.count = total

    def statistics(self) -> dict[str, Tensor]:
        """The pooled mean and unbiased variance by canonical name."""
        variance = self.squares / max(self.count - 1, 1)
        return {
            self.prefix + "running_mean": self.mean.to(self.kept[0].dtype),
            self.prefix + "running_var": variance.to(self.kept[1].dtype),
        }

    def write(self) -> None:
        """Put the pooled statistics into the layer."""
        self._set(*self.statistics().values())

    def restore(self) -> None:
        """Put everything back that recording touched."""
        self.norm.momentum = self.momentum
        self._set(*self.kept)
        if self.counter is not None:
            assert isinstance(self.norm.num_batches_tracked, Tensor)
            self.norm.num_batches_tracked.copy_(self.counter)

    def _set(self, mean: Tensor, variance: Tensor) -> None:
        assert isinstance(self.norm.running_mean, Tensor)
        assert isinstance(self.norm.running_var, Tensor)
        self.norm.running_mean.copy_(mean)
        self.norm.running_var.copy_(variance)


@contextmanager
def _recording(model: nn.Module, layers: list[_Layer]) -> Iterator[None]:
    """Put `layers` in training mode with momentum 1 and all else in evaluation; undo all of it."""
    modes = [(module, module.training) for _, module in walk(model)]
    handles = []
    try:
        model.eval()
        for layer in layers:
            layer.norm.training = True
            layer.norm.momentum = 1.0
            layer.norm.reset_running_stats()  # NaN from before would survive a momentum of 1
            handles.append(
                layer.norm.register_forward_pre_hook(layer.count_values, with_kwargs=True)
            )
            handles.append(layer.norm.register_forward_hook(layer.see))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            layer.restore()
        for module, training in modes:
            module.training = training
