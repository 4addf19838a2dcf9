"""State dicts: read the weights in a file, match their names with a network's, report what fits."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib import import_module
from math import isqrt
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models.vision_transformer import interpolate_embeddings

from ..files import read_settings_if_any
from ..modules.hooks import plain_name, token_grid
from ..run_layout import CHECKPOINTS, CONFIG, LAST, WEIGHTS
from .hub import fetch_weights, on_hub, place_of, preprocessor
from .stem import adapt_input_conv, find_stem

Shape = tuple[int, ...]
MANY = 10**6
"""More names than any network has."""
OF_TRANSFORMERS = ("position_embeddings", "position_embedding.weight")
"""How the names of position embeddings end in networks of transformers."""
CLASSIFIERS = ("fc.", "head.", "heads.", "classifier.")
"""How the names of a classifier's weights begin: they say nothing of the features."""
ONNX = ".onnx"
GIVE_RUN = "give the folder of the run that it is of"
log = logging.getLogger(__name__)


class KeyReport(NamedTuple):
    """Which weights of a file went into a network; ``str()`` of it is for reading.

    Attributes:
        matched: Names in the network that were loaded.
        missing: Names in the network that the file does not have.
        mismatched: Names that both have, in shapes that do not fit.
        unexpected: Names in the file that the network does not have.
        shapes: By name, the shape in the file and the one in the network, where they differ. A
            matched name among them was adapted: a stem to other channels, position embeddings to
            another image size.
        prefixes: What the names in the file begin with where the weights were taken, and after it
            what they begin with where others fit as well.
    """

    matched: list[str]
    missing: list[str]
    mismatched: list[str]
    unexpected: list[str]
    shapes: Mapping[str, tuple[Shape, Shape]]
    prefixes: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every weight of the network was loaded."""
        return not self.missing and not self.mismatched

    def __str__(self) -> str:
        count = len(self.matched) + len(self.missing) + len(self.mismatched)
        adapted = [name for name in self.matched if name in self.shapes]
        taken = f", those of {self.prefixes[0]}" if "".join(self.prefixes) else ""
        also = f"; also fits: {', '.join(self.prefixes[1:])}" if self.prefixes[1:] else ""
        lines = [f"matched {len(self.matched)} of {count} keys{taken}{also}"]
        others = {
            "adapted to this input": adapted,
            "missing": self.missing,
            "mismatched": self.mismatched,
            "unexpected": self.unexpected,
        }
        lines += [self.listed(label, names) for label, names in others.items() if names]
        return "\n".join(lines)

    def listed(self, label: str, names: list[str], shown: int = 5) -> str:
        """A label, how many names, and the first of them with both shapes where they differ."""
        lines = []
        for name in names[:shown]:
            shapes = self.shapes.get(name)
            lines.append(f"{name} {shapes[0]} for {shapes[1]}" if shapes else name)
        more = [f"and {len(names) - shown} more"] if len(names) > shown else []
        return f"{label} {len(names)}: {', '.join([*lines, *more])}"


def load_weights(net: nn.Module, source: str | Path) -> KeyReport:
    """Load the weights of a file into a network, and report which fit.

    The file may be safetensors, a state dict, or a checkpoint that holds one at any depth. Names
    may have any prefix (``module.``, ``backbone.``, ``state_dict.model.encoder.``): the one under
    which most weights fit is taken, of equals that of a teacher or average (``teacher.``,
    ``model_ema.``), else the first. A stem is adapted to the network's channels and position
    embeddings to its image size; every other weight of another shape is left as it was. Where less
    than half of the network was filled, classifiers apart, a warning says so.

    Args:
        net: The network; changed in place.
        source: The file, a run directory, or ``hf://OWNER/NAME[/FILE]`` on the Hugging Face Hub.

    Raises:
        ValueError: The file cannot be read, nothing in it fits, or what fits holds NaN.
    """
    path = find_weights(source, " (--weights takes 'pretrained', too)")
    report = load_matching(net, read_state_dict(path), str(path))
    sizes = {n: tensor.numel() for n, tensor in tensors_of(net).items() if not is_classifier(n)}
    filled, every = sum(sizes.get(name, 0) for name in report.matched), sum(sizes.values())
    if filled < every / 2:
        warnings.warn(
            f"{path} fills only {filled / every:.0%} of {type(net).__name__} (classifiers apart), "
            f"and the rest is unchanged; is it from another model? {report}",
            stacklevel=2,
        )
    if on_hub(source):
        take_rgb(net, str(source), report)
    return report


def take_rgb(net: nn.Module, source: str, report: KeyReport) -> None:
    """Turn a stem around whose weights came from a repository that feeds it blue, green and red."""
    fed, stem = preprocessor(place_of(source)) or {}, find_stem(net)
    if not fed.get("do_flip_channel_order") or stem is None or stem[1].in_channels != 3:
        return
    name, conv = stem
    if f"{plain_name(name)}.weight" in report.matched:
        conv.weight.data = conv.weight.data.flip(1)
        log.info(
            "the weights of %s are for blue, green, red; those of %s were turned around, so that "
            "the network takes red, green, blue, as does what is trained or exported from it",
            source,
            name,
        )


def find_weights(source: str | Path, more: str = "") -> Path:
    """The file itself, from the Hub if need be; of a run its weights, or its last checkpoint.

    ``more`` is said where there is neither.
    """
    if on_hub(source):
        return fetch_weights(str(source))
    path = Path(source).expanduser()
    if path.is_dir():
        last = path / CHECKPOINTS / LAST
        if (path / WEIGHTS).is_file():
            return path / WEIGHTS
        if last.is_file():
            log.warning("%s has no %s yet: loading its last checkpoint", path, WEIGHTS)
            return last
        every = read_settings_if_any(path / CONFIG).get("checkpoint_every")
        hint = (
            f": its run is training or ended early, and first saves at step {every}"
            if every
            else ""
        )
        raise ValueError(
            f"{path} has no {WEIGHTS} and no {CHECKPOINTS}/{LAST}{hint}; give the directory of a "
            "run that has saved, or a weights file"
        )
    if not path.is_file():
        raise ValueError(
            f"there are no weights at {path}; give a run directory or a .safetensors, .pt or .pth "
            f"file{more}"
        )
    return path


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file on the CPU, by name; names of nested dicts are joined by dots."""
    if path.suffix == ONNX:
        raise ValueError(f"{path} holds a computation, not weights by name; {GIVE_RUN}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([Namespace]):  # the arguments of many scripts
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{path} cannot be read as weights alone: it is damaged, or a saved network or "
            "checkpoint with classes in it, which could run any code when loaded. If you trust it, "
            "save its weights alone: keep = lambda v: v if torch.is_tensor(v) else {k: keep(w) "
            "for k, w in v.items()} if isinstance(v, dict) else keep(v.state_dict()) "
            "if hasattr(v, 'state_dict') else {}; "
            f"torch.save(keep(torch.load({str(path)!r}, weights_only=False)), 'weights.pt')"
        ) from error
    except Exception as error:  # for a damaged file torch raises anything, KeyError to OSError
        raise ValueError(
            f"{path} cannot be read as weights: it is damaged or something else "
            f"({type(error).__name__}: {error}); get it again, or give a .safetensors, .pt or .pth "
            "file"
        ) from error
    return dict(flatten(content, ""))


def flatten(content: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts, with their dotted names."""
    if isinstance(content, Tensor):
        yield name, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from flatten(value, f"{name}.{key}" if name else str(key))


def tensors_of(net: nn.Module) -> dict[str, Tensor]:
    """A network's state dict without the extra state that its modules may keep."""
    return {name: value for name, value in net.state_dict().items() if isinstance(value, Tensor)}


def load_state(net: nn.Module, tensors: Mapping[str, Any], *, strict: bool = True) -> None:
    """Load a state dict without the versions of its modules' code, as written by the present one.

    Torch keeps them beside the tensors, files do not, and torchvision's MNASNet loads none without.
    """
    state = net.state_dict()
    state.clear()
    state.update(tensors)
    net.load_state_dict(state, strict=strict)


def load_matching(net: nn.Module, tensors: Mapping[str, Tensor], source: str) -> KeyReport:
    """`load_weights` from tensors by name; ``source`` says in the error where they come from."""
    wanted = tensors_of(net)
    given, prefixes = match_names(tensors, wanted)
    shapes = {
        name: (tuple(given[name].shape), tuple(tensor.shape))
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    }
    if shapes:
        given = adapt_to_input(net, given, list(shapes))
    shared = [name for name in wanted if name in given]
    matched = [name for name in shared if given[name].shape == wanted[name].shape]
    # Biases, counters of batches, or a classifier alone are no match.
    kernels = {n for n, tensor in wanted.items() if tensor.ndim >= 2 and not is_classifier(n)}
    if (kernels or {n for n, tensor in wanted.items() if tensor.ndim}).isdisjoint(matched):
        raise ValueError(
            f"nothing in {source} fits {type(net).__name__}: the file begins with "
            f"{', '.join(list(tensors)[:3]) or 'no tensor at all'}, the network with "
            f"{', '.join(list(wanted)[:3])}; give weights of this model, or build the model they "
            "belong to"
        )
    if wrong := [name for name in matched if given[name].float().isnan().any()]:
        raise ValueError(
            f"{source} holds NaN in {len(wrong)} of {len(matched)} tensors "
            f"({', '.join(wrong[:3])}), as after a run that diverged; give an earlier checkpoint"
        )
    load_state(net, {name: given[name] for name in matched}, strict=False)
    return KeyReport(
        matched=matched,
        missing=[name for name in wanted if name not in given],
        mismatched=[name for name in shared if given[name].shape != wanted[name].shape],
        unexpected=[name for name in given if name not in wanted],
        shapes=shapes,
        prefixes=tuple(prefixes),
    )


def is_classifier(name: str) -> bool:
    """Whether a weight is one of a classifier, by its name."""
    return name.startswith(CLASSIFIERS)


def tell(report: KeyReport, source: str, model: str) -> None:
    """Log that all weights of a model were found, classifiers apart, or warn which were not."""
    others = [*report.mismatched, *report.unexpected]
    if not others and all(map(is_classifier, report.missing)):
        log.info("%s: %s", source, report)
    else:
        warnings.warn(f"{source} does not fill all of {model}: {report}", stacklevel=3)


def check_code(source: str, added: list[str], removed: list[str]) -> None:
    """Refuse a network whose code gained or lost weights since those of a run were written."""
    if added or removed:
        names = [f"{name} is missing" for name in added]
        names += [f"{name} is unexpected" for name in removed]
        more = f" (and {len(names) - 5} more)" * (len(names) > 5)
        raise ValueError(
            f"the model's code has changed since the run: of the weights in {source} "
            f"{', '.join(names[:5])}{more}; use the model's code from the run, or give the file to "
            "a new run as --weights, which loads what fits"
        )


def match_names(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under the network's names, and the prefixes in the file that fit, taken first."""
    tensors = {plain_name(name): tensor for name, tensor in tensors.items()}
    starts = [name[:end] for name in wanted for end, dot in enumerate(name, 1) if dot == "."]
    large = [start for start, names in Counter(starts).items() if names >= len(wanted) / 4]
    inward = prefix_scores(wanted, tensors)
    inner = max(inward, key=inward.__getitem__)  # of any part, where the file has no prefix
    fits = [("", prefix_scores(tensors, wanted)), (inner, Counter({"": inward[inner]}))]
    for start in large:  # of a large part, prefixes on both sides
        part = {n.removeprefix(start): value for n, value in wanted.items() if n.startswith(start)}
        fits.append((start, prefix_scores(tensors, part)))
    inner, scores = max(fits, key=lambda fit: max(fit[1].values()))
    best = max(scores.values())
    outers = sorted((prefix for prefix, score in scores.items() if score == best), key=is_trained)
    inside = {name: tensor for name, tensor in tensors.items() if name.startswith(outers[0])}
    return {inner + name.removeprefix(outers[0]): tensor for name, tensor in inside.items()}, outers


def is_trained(prefix: str) -> bool:
    """Whether weights are those that were trained, not their average, which is the better one."""
    return {"teacher", "ema"}.isdisjoint(re.split(r"[._]", prefix))


def prefix_scores(longer: Mapping[str, Tensor], shorter: Mapping[str, Tensor]) -> Counter[str]:
    """By prefix to remove from ``longer``'s names: how much of ``shorter`` is found then."""
    scores: Counter[str] = Counter({"": 0})
    for name, tensor in longer.items():
        parts = name.split(".")
        for start in range(len(parts)):
            rest = ".".join(parts[start:])
            if rest in shorter:
                same = shorter[rest].shape == tensor.shape  # outweighs any number of names
                scores[name.removesuffix(rest)] += 1 + same * MANY
    return scores


def adapt_to_input(
    net: nn.Module, given: dict[str, Tensor], misfits: list[str]
) -> dict[str, Tensor]:
    """The stem adapted to the network's channels, position embeddings to its image size."""
    stem = find_stem(net)
    if stem is not None and stem[1].groups == 1 and f"{stem[0]}.weight" in misfits:
        kernels = given[f"{stem[0]}.weight"]
        if kernels.ndim == 4 and kernels.shape[1] != stem[1].in_channels:
            adapted = adapt_input_conv(stem[1].in_channels, kernels)
            given = given | {f"{stem[0]}.weight": adapted}
    tables = [name for name in misfits if re.search("pos_?embed|position", name)]
    owners: dict[str, list[str]] = {}
    for name in tables:
        parts = name.split(".")[:-1]
        starts = [".".join(parts[:end]) for end in range(len(parts) + 1)]
        owner = next((start for start in starts if knows_size(net.get_submodule(start))), None)
        if owner is not None:
            owners.setdefault(f"{owner}." if owner else "", []).append(name)
    for start, names in owners.items():
        state = {n.removeprefix(start): value for n, value in given.items() if n.startswith(start)}
        part = net.get_submodule(start.removesuffix("."))
        try:
            state = fit_positions(part, state, [name.removeprefix(start) for name in names])
        except Exception as error:  # libraries raise anything
            log.warning(
                "%s cannot be resized (do class or register tokens differ?): %s", names[0], error
            )
            continue
        others = {name: value for name, value in given.items() if not name.startswith(start)}
        given = others | {start + name: value for name, value in state.items()}
    return given


def knows_size(part: nn.Module) -> bool:
    """Whether position embeddings can be resized for a network, by a function of its library."""
    library = type(part).__module__
    is_timm = library.startswith("timm.") and hasattr(sys.modules[library], "checkpoint_filter_fn")
    is_sized = hasattr(getattr(part, "config", None), "image_size")  # of transformers
    return is_timm or is_sized or isinstance(part, VisionTransformer)


def fit_positions(net: nn.Module, given: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """The weights, position embeddings of these names resized, of a network that `knows_size`."""
    if hasattr(net, "config"):
        tables = [name for name in names if name.endswith(OF_TRANSFORMERS)]
        return given | {name: resized_positions(name, given[name], net) for name in tables}
    if isinstance(net, VisionTransformer):
        return dict(interpolate_embeddings(net.image_size, net.patch_size, given))
    # Most transformers of timm have a function that does this for their pretrained weights.
    return dict(sys.modules[type(net).__module__].checkpoint_filter_fn(given, net))


def resized_positions(name: str, table: Tensor, net: nn.Module) -> Tensor:
    """Position embeddings ``(1, n, c)`` or ``(n, c)`` for a network of transformers."""
    config: Any = net.config
    sides = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    grid = [side // config.patch_size for side in sides]
    prefix = net.state_dict()[name].shape[-2] - grid[0] * grid[1]
    cells = table.shape[-2] - prefix
    side = isqrt(cells)
    old = (side, side) if side**2 == cells else token_grid(cells, (sides[0], sides[1]))
    resample = import_module("timm.layers").resample_abs_pos_embed
    resized: Tensor = resample(table.reshape(1, *table.shape[-2:]), grid, [*old], prefix)
    return resized if table.ndim == 3 else resized[0]
