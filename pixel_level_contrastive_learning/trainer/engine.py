"""What drives a run: the stream of batches, and Lightning's trainer."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from ..augment import Photometry
from ..data.loader import StatefulLoader, build_loader
from .assembly import Images, view_size
from .config import PretrainConfig
from .directory import WholeCheckpoints
from .machine import Devices, is_writer
from .plan import Facts, workers


def loader_of(
    config: PretrainConfig, images: Images, facts: Facts, rank: int, directory: Path | None
) -> StatefulLoader:
    """The loader of this process."""
    assert isinstance(config.batch_size, int)
    assert config.blur_sigma != "auto"
    photometry = [
        Photometry(
            jitter=config.jitter,
            prob_jitter=config.prob_jitter,
            prob_gray=config.prob_gray,
            prob_blur=blur,
            sigma=config.blur_sigma,
            prob_solarise=solarise,
        )
        for blur, solarise in zip(config.prob_blur, config.prob_solarise, strict=True)
    ]
    return build_loader(
        images.training,
        images.statistics,
        image_size=view_size(config),
        batch_size=config.batch_size // facts.processes,
        crop_area=config.crop_area,
        aspect_ratio=config.aspect_ratio,
        prob_hflip=config.prob_hflip,
        prob_vflip=config.prob_vflip,
        max_rotation=config.max_rotation,
        photometry=(photometry[0], photometry[1]),
        seed=config.seed,
        workers=workers(config, facts),
        rank=rank,
        world=facts.processes,
        max_broken=config.max_broken,
        skipped_file=None if directory is None else directory / "skipped.txt",
        pin_memory=facts.device == "cuda",
    )


class Stream:
    """The batches of the rest of a run, epoch after epoch, as one pass.

    Lightning then has no epochs to count and none to get wrong when a run is resumed: the loader
    is the clock, and is set by samples. It is made when first asked for a batch, since only then
    does a process know its rank.

    Args:
        make: Makes the loader of a rank.
        samples: Samples seen before, over all processes.
        steps: Batches to give.
        told_to_stop: Whether the run was told to stop: then workers that died are no error, and
            the stream ends.
    """

    def __init__(
        self,
        make: Callable[[int], StatefulLoader],
        samples: int,
        steps: int,
        told_to_stop: Callable[[], bool],
    ) -> None:
        self.make = make
        self.told_to_stop = told_to_stop
        self.samples = samples
        self.steps = steps
        self.loader: StatefulLoader | None = None
        self.running: Generator[Any, None, None] | None = None
        self.seconds_waited = 0.0

    @property
    def waited(self) -> float:
        """Seconds spent waiting for data so far."""
        return self.seconds_waited if self.loader is None else float(self.loader.waited)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        self.running = self.batches()
        return self.running

    def batches(self) -> Generator[Any, None, None]:
        """The batches."""
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.loader = self.make(torch.distributed.get_rank() if together else 0)
        self.loader.start_at(self.samples)
        given = 0
        while given < self.steps:
            batches = iter(self.loader)
            while given < self.steps:
                try:
                    batch = next(batches)
                except StopIteration:
                    break
                except (RuntimeError, OSError, EOFError):  # by where the worker was when it died
                    if self.told_to_stop():
                        return
                    raise
                yield batch
                given += 1

    def close(self) -> None:
        """Let the workers go, wherever the run stopped: else its end would wait for them."""
        if self.running is not None:
            self.running.close()
        if self.loader is not None:
            self.seconds_waited = self.waited
        self.running = self.loader = None


def strategy_of(config: PretrainConfig, devices: Devices) -> Strategy | str:
    """How devices share the work.

    FSDP is torch's second (`fully_shard`), which keeps parameters whole tensors to the eye: the
    first flattens them, and the target could not follow.
    """
    if devices.processes == 1:
        return "auto"
    if config.strategy == "fsdp":
        return ModelParallelStrategy(
            data_parallel_size=devices.processes,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
        )
    # Batch norm's buffers are each process's own: in training nobody reads them.
    return DDPStrategy(
        find_unused_parameters=False, broadcast_buffers=False, gradient_as_bucket_view=True
    )


def check_loggers(config: PretrainConfig) -> None:
    """Find out whether the loggers that are asked for are installed.

    Raises:
        ValueError: One is not.
    """
    for name in ("wandb", "mlflow"):
        if name in config.loggers and find_spec(name) is None:
            raise ValueError(
                f"loggers names {name!r}, which is not installed; pip install {name}, or take csv: "
                "metrics.jsonl is written in any case"
            )


def loggers_of(config: PretrainConfig, folder: Path, step: int) -> list[Logger]:
    """Lightning's loggers by name, writing into the folder of the run from a step on."""
    part = f"from-step-{step:08d}" if step else ""  # its CSV would replace the one that is there
    makers: dict[str, Any] = {
        "tensorboard": lambda: TensorBoardLogger(folder, name="tensorboard", version=""),
        "csv": lambda: CSVLogger(folder, name="csv", version=part, flush_logs_every_n_steps=1),
        "wandb": lambda: WandbLogger(save_dir=folder, name=folder.name),
        "mlflow": lambda: MLFlowLogger(folder.name, tracking_uri=f"file:{folder / 'mlflow'}"),
    }
    return [makers[name]() for name in config.loggers]


def trainer_of(
    config: PretrainConfig,
    devices: Devices,
    folder: Path,
    done: int,
    steps: int,
    callbacks: list[Callback],
) -> Trainer:
    """Lightning's trainer for so many steps."""
    plugins: list[Any] = [WholeCheckpoints()]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # --resume does it, and says so
    return Trainer(
        accelerator={"cuda": "gpu"}.get(devices.kind, devices.kind),
        devices=devices.each_node,
        num_nodes=devices.nodes,
        strategy=strategy_of(config, devices),
        precision="bf16-mixed" if config.precision == "bfloat16" else "32-true",
        max_steps=steps,
        logger=loggers_of(config, folder, done) if is_writer() else False,
        callbacks=callbacks,
        plugins=plugins,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        benchmark=devices.kind == "cuda",
        default_root_dir=folder,
    )
