"""Averages as other libraries save them.

Each layout was compared with a file that the library itself wrote: ema-pytorch 0.8.3, timm 1.0.31,
lightning 2.6.6, diffusers 0.42.1; torch's own AveragedModel is used as it is.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

Weights = dict[str, Tensor]


class Net(nn.Module):
    """A batch norm for buffers of both kinds, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(3, 4, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.decode = nn.Linear(3, 4, bias=False)
        self.decode.weight = self.encode.weight


def live_and_average() -> tuple[Weights, Weights]:
    """Two states of one model that differ in every floating value; ties are ties."""
    live, average = Net(), Net()
    with torch.no_grad():
        for tensor in average.state_dict().values():
            tensor.add_(1)
    return live.state_dict(), average.state_dict()


def ema_pytorch(folder: Path) -> Path:
    """`EMA.state_dict()` with the online model, beside the optimizer's."""
    live, average = live_and_average()
    state: dict[str, Any] = {"initted": torch.tensor(True), "step": torch.tensor(40)}
    state |= {f"ema_model.{name}": tensor for name, tensor in average.items()}
    state |= {f"online_model.{name}": tensor for name, tensor in live.items()}
    torch.save({"model": live, "ema": state, "optimizer": optimizer()}, folder / "ema.pt")
    return folder / "ema.pt"


def timm(folder: Path) -> Path:
    """What its CheckpointSaver writes; the arguments are no plain value."""
    live, average = live_and_average()
    state = {
        "epoch": 3,
        "arch": "net",
        "state_dict": live,
        "optimizer": optimizer(),
        "version": 2,
        "args": argparse.Namespace(model="net", lr=0.1),
        "state_dict_ema": average,
        "metric": 0.5,
    }
    torch.save(state, folder / "last.pth.tar")
    return folder / "last.pth.tar"


def averaged_model(folder: Path) -> Path:
    """`AveragedModel.state_dict()`, of a wrapped model, in the old format of torch."""
    _, average = live_and_average()
    net = Net()
    net.load_state_dict(average)
    model = AveragedModel(nn.DataParallel(net), use_buffers=True)
    torch.save(model.state_dict(), folder / "swa.pt", _use_new_zipfile_serialization=False)
    return folder / "swa.pt"


def lightning(folder: Path) -> Path:
    """A checkpoint with the WeightAveraging callback: the average takes the usual place."""
    live, average = live_and_average()
    state = {
        "epoch": 1,
        "global_step": 40,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": average,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint": {"best": folder}},
        "optimizer_states": [optimizer()],
        "lr_schedulers": [],
        "current_model_state": live,
        "averaging_state": {"n_averaged": torch.tensor(5)},
    }
    torch.save(state, folder / "epoch=1-step=40.ckpt")
    return folder / "epoch=1-step=40.ckpt"


def diffusers(folder: Path) -> Path:
    """The folder of `EMAModel.save_pretrained`; its writer knows no ties."""
    _, average = live_and_average()
    config = {
        "_class_name": "Net",
        "decay": 0.9999,
        "inv_gamma": 1.0,
        "min_decay": 0.0,
        "optimization_step": 40,
        "power": 0.6667,
        "update_after_step": 0,
        "use_ema_warmup": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    copies = {name: tensor.clone() for name, tensor in average.items()}
    safetensors.torch.save_file(
        copies, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"}
    )
    return folder


def optimizer() -> dict[str, Any]:
    """The state of an optimizer, whose tensors are no weights."""
    model = Net()
    adam = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    adam.step()
    return adam.state_dict()


LAYOUTS: dict[str, tuple[Callable[[Path], Path], str, float | None]] = {
    "ema-pytorch": (ema_pytorch, "ema-pytorch EMA", 40.0),
    "timm": (timm, "timm ModelEma (state_dict_ema)", None),
    "torch": (averaged_model, "torch AveragedModel", None),
    "lightning": (lightning, "Lightning averages", 40.0),
    "diffusers": (diffusers, "diffusers EMAModel", 40.0),
}
