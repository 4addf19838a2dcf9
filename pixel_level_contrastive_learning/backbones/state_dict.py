"""Keys: which weights of a file belong where in a network, and the report of what fitted."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models.vision_transformer import interpolate_embeddings

from ..modules.hooks import plain_name
from .stem import spread_kernels, stem_of

WEIGHTS = "backbone.safetensors"
"""What the weights are called in a run directory."""
CHECKPOINTS, LAST = "checkpoints", "last.ckpt"
"""The folder of a run's checkpoints, and the second name of the last of them."""
SHOWN = 5
"""Names of each kind that a report shows."""

Shape = tuple[int, ...]
log = logging.getLogger(__name__)


class KeyReport(NamedTuple):
    """Which weights of a file went into a network; ``str()`` of it is for reading.

    Attributes:
        matched: Names in the network that were filled.
        missing: Names in the network that the file does not have.
        mismatched: Names that both have, in shapes that do not fit.
        unexpected: Names in the file that the network does not have.
        shapes: By name, the shape in the file and the one in the network, where they differ. A
            name that is matched all the same was fitted: a stem spread to other channels, position
            embeddings resampled for another image size.
    """

    matched: list[str]
    missing: list[str]
    mismatched: list[str]
    unexpected: list[str]
    shapes: Mapping[str, tuple[Shape, Shape]]

    @property
    def whole(self) -> bool:
        """Whether every weight of the network was filled."""
        return not self.missing and not self.mismatched

    def __str__(self) -> str:
        count = len(self.matched) + len(self.missing) + len(self.mismatched)
        fitted = [name for name in self.matched if name in self.shapes]
        lines = [f"matched {len(self.matched)} of {count} keys"]
        for what, names in (
            ("fitted to this input", fitted),
            ("missing", self.missing),
            ("mismatched", self.mismatched),
            ("unexpected", self.unexpected),
        ):
            if names or what in ("missing", "mismatched"):
                lines.append(f"{what} {len(names)}{': ' if names else ''}{self.listed(names)}")
        return "\n".join(lines)

    def listed(self, names: list[str]) -> str:
        """The first names, with both shapes where they differ."""
        shown = [
            f"{name} {self.shapes[name][0]} for {self.shapes[name][1]}"
            if name in self.shapes
            else name
            for name in names[:SHOWN]
        ]
        more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
        return ", ".join([*shown, *more])


def load_weights(net: nn.Module, source: str | Path) -> KeyReport:
    """Fill a network with the weights of a file, and say what fitted.

    The file may be safetensors, a state dict, or a checkpoint that holds one at any depth; names
    may begin with anything that was wrapped around the network (``module.``, ``backbone.``,
    ``state_dict.model.encoder.``): the beginning under which most fits is taken, the first of
    equals. A stem is spread to the network's channels, and position embeddings are resampled to its
    image size; every other weight of another shape is left as it was.

    Args:
        net: The network; changed in place.
        source: The file, or a run directory.

    Raises:
        ValueError: The file cannot be read, or nothing in it fits.
    """
    path = weights_file(source)
    return fill(net, read_tensors(path), str(path))


def weights_file(source: str | Path) -> Path:
    """The file of weights that is meant: itself, or the one in a run directory.

    Of a run that has not ended it is the last checkpoint.

    Raises:
        ValueError: There is no such file.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        last = path / CHECKPOINTS / LAST
        if (path / WEIGHTS).is_file():
            return path / WEIGHTS
        if last.is_file():
            log.warning("%s has no %s yet: taking its last checkpoint", path, WEIGHTS)
            return last
        raise ValueError(
            f"{path} has no {WEIGHTS} and no {CHECKPOINTS}/{LAST}; give the directory of a run "
            "that has saved, or a file of weights"
        )
    if not path.is_file():
        raise ValueError(
            f"there are no weights at {path}; give a run directory or a .safetensors, .pt or .pth "
            "file"
        )
    return path


def home(weights: Path) -> Path:
    """The folder that a file of weights belongs to: of a run's checkpoint, that of the run."""
    of_run = weights.parent.name == CHECKPOINTS and weights.suffix == ".ckpt"
    return weights.parent.parent if of_run else weights.parent


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file by its name, names of nested dicts joined by dots; on the CPU.

    Raises:
        ValueError: The file is damaged, or holds more than tensors and plain values.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        held = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{path} is no file of tensors: it is damaged, or a saved network or checkpoint with "
            "classes in it, which could run any code when loaded. If you trust it, save its "
            f"weights alone: net = torch.load({str(path)!r}, weights_only=False); "
            "torch.save(net.state_dict(), 'weights.pt')"
        ) from error
    except Exception as error:  # over junk torch raises anything, from KeyError to OSError
        raise ValueError(
            f"{path} cannot be read as weights: it is damaged or something else "
            f"({type(error).__name__}: {error}); get it again, or give a .safetensors, .pt or .pth "
            "file"
        ) from error
    return dict(flat(held, ""))


def flat(held: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts, with their dotted names."""
    if isinstance(held, Tensor):
        yield name, held
    elif isinstance(held, Mapping):
        for key, value in held.items():
            yield from flat(value, f"{name}.{key}" if name else str(key))


def tensors_of(net: nn.Module) -> dict[str, Tensor]:
    """A network's state dict without the extra state that its modules may keep."""
    return {name: held for name, held in net.state_dict().items() if isinstance(held, Tensor)}


def fill(net: nn.Module, tensors: Mapping[str, Tensor], source: str) -> KeyReport:
    """Fill a network with tensors by name, as `load_weights` does.

    Args:
        net: The network; changed in place.
        tensors: The weights by name.
        source: Where they come from, for the complaint.

    Raises:
        ValueError: Nothing fits.
    """
    wanted = tensors_of(net)
    given = own_names(tensors, wanted)
    shapes = {
        name: (tuple(given[name].shape), tuple(tensor.shape))
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    }
    given = fitted(net, given, wanted) if shapes else given
    held = [name for name in wanted if name in given]
    matched = [name for name in held if given[name].shape == wanted[name].shape]
    if not any(wanted[name].ndim for name in matched):  # a lone counter of batches is no match
        raise ValueError(
            f"nothing in {source} fits {type(net).__name__}: the file begins with "
            f"{', '.join(list(tensors)[:3]) or 'no tensor at all'}, the network with "
            f"{', '.join(list(wanted)[:3])}; give weights of this very model, or build the model "
            "they are of"
        )
    net.load_state_dict({name: given[name] for name in matched}, strict=False)
    return KeyReport(
        matched=matched,
        missing=[name for name in wanted if name not in given],
        mismatched=[name for name in held if given[name].shape != wanted[name].shape],
        unexpected=[name for name in given if name not in wanted],
        shapes=shapes,
    )


def own_names(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the network's names: what is wrapped around either side taken off."""
    tensors = {plain_name(name): tensor for name, tensor in tensors.items()}
    outside, votes = best_beginning(tensors, wanted)
    inside, more = best_beginning(wanted, tensors)
    if more > votes:  # the file is of a part of this network
        return {inside + name: tensor for name, tensor in tensors.items()}
    return {
        name.removeprefix(outside): tensor
        for name, tensor in tensors.items()
        if name.startswith(outside)
    }


def best_beginning(longer: Mapping[str, Tensor], shorter: Mapping[str, Tensor]) -> tuple[str, int]:
    """What to take off the front of ``longer``'s names so that most are ``shorter``'s, and a score.

    A name counts one, and the same shape as well outweighs any number of names.
    """
    votes: Counter[str] = Counter({"": 0})
    for name, tensor in longer.items():
        parts = name.split(".")
        for start in range(len(parts)):
            rest = ".".join(parts[start:])
            if rest in shorter:
                same = shorter[rest].shape == tensor.shape
                votes[name.removesuffix(rest)] += 1 + same * (len(longer) + len(shorter))
    return max(votes.items(), key=lambda vote: vote[1])


def fitted(
    net: nn.Module, given: dict[str, Tensor], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The weights fitted to the network's input: its channels and, for transformers, its size."""
    stem = stem_of(net)
    if stem is not None:
        name, conv = f"{stem[0]}.weight", stem[1]
        kernels = given.get(name)
        other_channels = (
            kernels is not None
            and kernels.ndim == 4
            and conv.groups == 1
            and kernels.shape[1] != conv.in_channels
        )
        if kernels is not None and other_channels:
            given = given | {name: spread_kernels(kernels, conv.in_channels)}
    positions = ("pos_embed", "relative_position")
    odd = [
        name
        for name, tensor in wanted.items()
        if name in given
        and given[name].shape != tensor.shape
        and any(kind in name for kind in positions)
    ]
    if not odd:
        return given
    if isinstance(net, VisionTransformer):
        fitting: dict[str, Tensor] = interpolate_embeddings(net.image_size, net.patch_size, given)
        return fitting
    # Most transformers of timm come with a function that does this for their pretrained weights.
    library = sys.modules[type(net).__module__]
    fit = getattr(library, "checkpoint_filter_fn", None)
    if fit is not None and library.__name__.startswith("timm."):
        return dict(fit(given, net))
    return given
