"""Other people's averages as the checks of polyak.testing see them, each driven as documented.

Where a library offers several ways, the one its documentation shows first for an exponential
average is taken; warm-ups are off, since the cases ask for a constant decay. Each factory imports
its library when it is first called for, so that a missing one costs one column.
"""

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.metadata import distribution
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor, nn

from polyak.testing import Factory, PolyakAdapter


@dataclass(frozen=True)
class Peer:
    """One column of the table.

    Attributes:
        name: of the class.
        package: whose version is shown.
        load: imports the library and returns the factory.
        how: how the class is driven, in a sentence.
        without: cases that make no sense for it, each with the reason.
    """

    name: str
    package: str
    load: Callable[[], Factory]
    how: str
    without: Mapping[str, str]


def _names(model: nn.Module) -> list[str]:
    """Parameter names for classes that keep none, as the bare class would have them."""
    bare = getattr(model, "_orig_mod", model)
    return [name for name, _ in bare.named_parameters()]


def _torch() -> Factory:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    class Torch:
        def __init__(self, model: nn.Module, decay: float) -> None:
            self.average = AveragedModel(
                model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True
            )

        def update(self, model: nn.Module) -> None:
            self.average.update_parameters(model)

        def averaged(self) -> nn.Module:
            return self.average.module

        def state_dict(self) -> dict[str, Any]:
            return self.average.state_dict()

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            self.average.load_state_dict(state)

    return Torch


def _ema_pytorch() -> Factory:
    from ema_pytorch import EMA

    class EmaPytorch:
        def __init__(self, model: nn.Module, decay: float) -> None:
            # min_value=beta switches the warm-up off.
            self.average = EMA(
                model, beta=decay, min_value=decay, update_after_step=0, update_every=1
            )

        def every(self, interval: int) -> None:
            self.average.update_every = interval

        def update(self, model: nn.Module) -> None:
            self.average.update()

        def averaged(self) -> nn.Module:
            found: nn.Module = self.average.ema_model
            return found

        def state_dict(self) -> dict[str, Any]:
            state: dict[str, Any] = self.average.state_dict()
            return state

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            self.average.load_state_dict(state)

    return EmaPytorch


def _torch_ema() -> Factory:
    from torch_ema import ExponentialMovingAverage

    class TorchEma:
        def __init__(self, model: nn.Module, decay: float) -> None:
            self.names = _names(model)
            self.average = ExponentialMovingAverage(
                model.parameters(), decay=decay, use_num_updates=False
            )

        def update(self, model: nn.Module) -> None:
            self.average.update(model.parameters())

        def averaged(self) -> dict[str, Tensor]:
            return dict(zip(self.names, self.average.shadow_params, strict=True))

        def applied(self, model: nn.Module) -> AbstractContextManager[None]:
            block: AbstractContextManager[None] = self.average.average_parameters(
                model.parameters()
            )
            return block

        def state_dict(self) -> dict[str, Any]:
            state: dict[str, Any] = self.average.state_dict()
            return state

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.average.load_state_dict(state)

    return TorchEma


def _module_of_file(package: str, path: str) -> ModuleType:
    """Load one file of an installed package without the rest of it.

    `import timm` wants torchvision, whose binaries must match torch's; the class needs only torch.
    """
    file = distribution(package).locate_file(path)
    name = path.removesuffix(".py").replace("/", "_")
    specification = importlib.util.spec_from_file_location(name, str(file))
    if specification is None or specification.loader is None:
        raise ImportError(f"{package} has no {path}")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


def _timm() -> Factory:
    ema_class = _module_of_file("timm", "timm/utils/model_ema.py").ModelEmaV3

    class Timm:
        def __init__(self, model: nn.Module, decay: float) -> None:
            self.average = ema_class(model, decay=decay)

        def update(self, model: nn.Module) -> None:
            self.average.update(model)

        def averaged(self) -> nn.Module:
            found: nn.Module = self.average.module
            return found

        def state_dict(self) -> dict[str, Any]:
            state: dict[str, Any] = self.average.module.state_dict()
            return state

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            self.average.module.load_state_dict(state)

    return Timm


def _diffusers() -> Factory:
    from diffusers.training_utils import EMAModel

    class Diffusers:
        def __init__(self, model: nn.Module, decay: float) -> None:
            self.names = _names(model)
            # min_decay=decay switches the warm-up off.
            self.average = EMAModel(model.parameters(), decay=decay, min_decay=decay)

        def update(self, model: nn.Module) -> None:
            self.average.step(model.parameters())

        def averaged(self) -> dict[str, Tensor]:
            return dict(zip(self.names, self.average.shadow_params, strict=True))

        @contextmanager
        def applied(self, model: nn.Module) -> Iterator[None]:
            # The class has store, copy_to and restore; a careful user puts `finally` around them.
            self.average.store(model.parameters())
            self.average.copy_to(model.parameters())
            try:
                yield
            finally:
                self.average.restore(model.parameters())

        def state_dict(self) -> dict[str, Any]:
            state: dict[str, Any] = self.average.state_dict()
            return state

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.average.load_state_dict(state)

    return Diffusers


def _lightning() -> Factory:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import EMAWeightAveraging

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # a line for every load

    class Holder(pl.LightningModule):  # type: ignore[misc, unused-ignore]
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

    class Lightning:
        """The callback's hooks in the order in which the Trainer calls them."""

        def __init__(self, model: nn.Module, decay: float) -> None:
            self.holder = Holder(model)
            self.callback = EMAWeightAveraging(decay=decay)
            self.trainer: Any = SimpleNamespace(global_step=0)
            self.callback.setup(self.trainer, self.holder, "fit")

        def every(self, interval: int) -> None:
            self.callback.update_every_n_steps = interval

        def update(self, model: nn.Module) -> None:
            holder = self.holder if model is self.holder.model else Holder(model)
            self.trainer.global_step += 1
            self.callback.on_train_batch_end(self.trainer, holder, None, None, 0)

        def averaged(self) -> dict[str, Tensor]:
            state = self.callback._average_model.module.state_dict()
            return {name.removeprefix("model."): tensor for name, tensor in state.items()}

        @contextmanager
        def applied(self, model: nn.Module) -> Iterator[None]:
            # No `finally`: when validation raises, the Trainer calls on_exception, which this
            # callback does not have, and not on_validation_epoch_end.
            self.callback.on_validation_epoch_start(self.trainer, self.holder)
            yield
            self.callback.on_validation_epoch_end(self.trainer, self.holder)

        def state_dict(self) -> dict[str, Any]:
            checkpoint: dict[str, Any] = {"state_dict": self.holder.state_dict()}
            self.callback.on_save_checkpoint(self.trainer, self.holder, checkpoint)
            return {**checkpoint, "callback": self.callback.state_dict()}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            # A checkpoint without an average still has the model.
            checkpoint = state or {"state_dict": self.holder.state_dict()}
            self.holder.load_state_dict(checkpoint["state_dict"])
            self.callback.on_load_checkpoint(self.trainer, self.holder, checkpoint)
            if "callback" in checkpoint:
                self.callback.load_state_dict(checkpoint["callback"])
                self.trainer.global_step = checkpoint["callback"]["latest_update_step"]

    return Lightning


PEERS = (
    Peer(
        "polyak.Average",
        "polyak",
        lambda: PolyakAdapter,
        "`Average(model, Exponential(decay=d, debias=False))`; `applied()` for the block.",
        {},
    ),
    Peer(
        "torch AveragedModel",
        "torch",
        _torch,
        "`AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(d), use_buffers=True)`, the EMA "
        "example of its docstring (by keyword). It has no block: one evaluates the copy.",
        {},
    ),
    Peer(
        "ema-pytorch EMA",
        "ema-pytorch",
        _ema_pytorch,
        "`EMA(model, beta=d, min_value=d, update_after_step=0, update_every=1)`, so without the "
        "warm-up; everything else by default. It has no block: one evaluates the copy.",
        {},
    ),
    Peer(
        "torch-ema",
        "torch-ema",
        _torch_ema,
        "`ExponentialMovingAverage(model.parameters(), decay=d, use_num_updates=False)`, updated "
        "with the parameters passed, `average_parameters` for the block. It keeps parameters only.",
        {},
    ),
    Peer(
        "timm ModelEmaV3",
        "timm",
        _timm,
        "`ModelEmaV3(model, decay=d)`, everything else by default: bfloat16 averages are rounded "
        "stochastically, which is right on average and off by the number after ± in single "
        "weights; its documentation offers `dtype=torch.float32` for more. It has no block.",
        {},
    ),
    Peer(
        "diffusers EMAModel",
        "diffusers",
        _diffusers,
        "`EMAModel(model.parameters(), decay=d, min_decay=d)`, so without the warm-up; the block "
        "is `store`, `copy_to`, `restore` with a `finally` that its documentation leaves to the "
        "user. It keeps parameters only.",
        {},
    ),
    Peer(
        "Lightning EMAWeightAveraging",
        "lightning",
        _lightning,
        "the hooks of the callback in the order in which the Trainer calls them; the block is "
        "validation (E5 and F5 need a checkpoint written inside it; ModelCheckpoint by itself "
        "writes after its end).",
        {
            "F6": "loading restores the whole run, the model included, as it should",
            "E4": "the Trainer never trains during validation",
            "E-nested": "the Trainer never validates during validation",
        },
    ),
)
