"""The file names of a run's folder, and of one of features, each written once. Imports no torch."""

from collections.abc import Collection
from pathlib import Path

CONFIG = "config.yaml"
"""The settings, resolved; the run can be repeated from it."""
STATISTICS = "statistics.json"
"""Sizes, channels, mean and standard deviation of the images."""
METRICS = "metrics.jsonl"
"""The metrics of each step, a line a step."""
PROBE = "probe.jsonl"
"""The mean IoU of each probe, a line a probe."""
TRAIN_LOG = "train.log"
"""What was printed, with the settings, the system and the versions."""
SKIPPED = "skipped.txt"
"""Images that cannot be read, a name and a reason a line."""
BAD_BATCH = "bad_batch.pt"
"""The batch whose loss or gradient was NaN or infinite."""
PREVIEW = "preview"
"""Folder of the pairs of views that the loss compares, as pictures."""
PICTURES = "pictures"
"""Folder of the features of images, as pictures."""
FEATURES = "features.json"
"""What `pixelcl features` found, in a folder of its own."""
MAPS, ZARR_MAPS = "maps", "maps.zarr"
"""Folders of these features, in that folder."""

STEP, PAIRS, EXPORTED = "step-", "pairs-", "backbone-"
"""Beginnings of names: of the checkpoint and the picture of a step, of previews, and of what
`pixelcl export` writes, which goes on with the format."""
CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints."""
LAST = "last.ckpt"
"""The newest checkpoint, in `CHECKPOINTS`."""
BEST = "best.ckpt"
"""The checkpoint with the best probe, in `CHECKPOINTS`."""
WEIGHTS = "backbone.safetensors"
"""The backbone's weights."""
CARD = "backbone.json"
"""What is needed to use the weights."""

EVALUATION = "evaluation.json"
"""What `pixelcl evaluate` found with masks."""
CORRESPONDENCE = "correspondence.json"
"""What `pixelcl evaluate` found without masks."""
LABEL_CURVE = "label-curve.png"
"""Mean IoU over the number of masks, drawn by `pixelcl evaluate --fractions`."""
PREDICTIONS = "predictions"
"""Folder of predicted masks, as pictures."""
REPORT = "report.html"
"""The page that `pixelcl visualize` writes."""

LOCK = ".lock"
"""Locked by the process that trains."""
LOCK_HOLDER = ".lock-holder"
"""Process id and host of that process."""
LOCK_FILES = (LOCK, LOCK_HOLDER)
"""Gone when the run ends; left behind, without effect, when it is killed."""
LOGGERS = ("tensorboard", "csv", "wandb", "mlflow", "lightning_logs")
"""Where the loggers write, by their names, and where older versions did."""

EVERYTHING = (
    CONFIG,
    METRICS,
    TRAIN_LOG,
    STATISTICS,
    SKIPPED,
    CHECKPOINTS,
    PREVIEW,
    PICTURES,
    WEIGHTS,
    CARD,
    BAD_BATCH,
    EVALUATION,
    CORRESPONDENCE,
    LABEL_CURVE,
    PREDICTIONS,
    REPORT,
    PROBE,
    *LOGGERS,
)
"""What a run writes, and so what ``--overwrite`` removes; nothing else in the folder is touched."""


def is_ours(name: str, folders: Collection[str], files: Collection[str]) -> bool:
    """Whether a folder of these folders and files is one of a run, of features, or of previews."""
    is_run = CONFIG in files and CHECKPOINTS in folders
    of_features = FEATURES in files and not {MAPS, ZARR_MAPS}.isdisjoint(folders)
    previews = name == PREVIEW and not folders and all(file.startswith(PAIRS) for file in files)
    return is_run or of_features or previews


def run_folder(weights: Path) -> Path:
    """The folder of the run that a checkpoint is of; of any other file the folder it lies in."""
    is_checkpoint = weights.parent.name == CHECKPOINTS and weights.suffix == ".ckpt"
    return weights.parent.parent if is_checkpoint else weights.parent


def card_path(weights: Path) -> Path:
    """Where the card of a file of weights lies: beside it; of a checkpoint in its run's folder."""
    folder = run_folder(weights)
    return weights.with_suffix(".json") if folder == weights.parent else folder / CARD
