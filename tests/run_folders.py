"""What a run's folder holds, as tests read it."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from pixel_level_contrastive_learning.backbones.checkpoint import read_backbone


def lines(path: Path) -> list[dict[str, float]]:
    """A file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(run: Path) -> list[dict[str, float]]:
    return lines(run / "metrics.jsonl")


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run)]


def steps(run: Path) -> list[int]:
    return [int(line["step"]) for line in metrics(run)]


def log(run: Path) -> str:
    return (run / "train.log").read_text()


def config(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / "config.yaml").read_text())


def card(run: Path) -> dict[str, Any]:
    return json.loads((run / "backbone.json").read_text())


def weights(run: Path) -> dict[str, Tensor]:
    """Those of the backbone."""
    return read_backbone(run).net.state_dict()


def checkpoint(run: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def forget(run: Path, *names: str) -> None:
    """Remove checkpoints, as if the run had been killed before."""
    for name in names:
        (run / "checkpoints" / f"{name}.ckpt").unlink()


def files(run: Path) -> dict[Path, bytes]:
    """All that a run holds but its log."""
    paths = (path for path in run.rglob("*") if path.is_file() and path.name != "train.log")
    return {path: path.read_bytes() for path in paths}


def equal(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
