"""Push: a run's backbone to the Hugging Face Hub, with a page that describes it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from safetensors.torch import save

from .. import run_layout
from ..checks import import_extra, raise_together, unless
from ..files import read_settings_if_any
from .checkpoint import BackboneCard, clean_state_dict, read_backbone
from .custom import Model, custom_file, handing_over
from .export import named_in
from .factory import LIBRARIES, parse_model_name
from .hub import HUB, Repository, explain_hub_errors, hub_api, on_hub, place_of
from .snippets import how_to
from .state_dict import find_weights

PAGE = "README.md"
"""The page of a repository."""
SHOWN = ("loss", "epochs", "steps", "batch_size", "optimizer", "lr", "crop_area", "seed")
"""Settings that the page shows, those without paths."""
METHODS = {"pixpro": "PixPro", "pixcontrast": "PixContrast"}
"""What the losses are called."""


class Pushed(NamedTuple):
    """What was uploaded, or would be after a dry run: the files of a repository by name."""

    repository: str
    files: Mapping[str, bytes]
    dry_run: bool

    @property
    def page(self) -> str:
        """The repository's page, in Markdown."""
        return self.files[PAGE].decode()

    def __str__(self) -> str:
        verb = "would upload" if self.dry_run else "uploaded"
        sizes = [f"  {name}  {len(content):,} bytes" for name, content in self.files.items()]
        return "\n".join([f"{verb} to {self.repository}:", *sizes, "", self.page.rstrip()])


def push(
    run: str | Path,
    repository: str,
    *,
    private: bool = False,
    licence: str | None = None,
    dry_run: bool = False,
    model: Model | None = None,
) -> Pushed:
    """Upload a run's backbone, its card and a page describing the run; ``hf://`` reads it back.

    Paths on this machine are left out of what is uploaded.

    Args:
        run: A run directory, or a file with its card.
        repository: ``OWNER/NAME``, created if it does not exist; files of the same names are
            replaced.
        private: Make a new repository private, and refuse one that is public.
        licence: Licence of the weights, as the Hub names it, such as ``mit`` or ``cc-by-4.0``.
        dry_run: Upload nothing, and return what would be uploaded.
        model: As for `load_backbone`.

    Raises:
        ValueError: No backbone, one that lacks weights of its model, a revision or a file in the
            repository's name, no such owner, no write permission there, or a public repository
            where a private one is wanted.
        ConnectionError: The Hub cannot be reached.
    """
    place = place_of(HUB + repository.removeprefix(HUB))
    alone = place.revision is None and place.file is None
    words = "OWNER/NAME alone: the newest revision is written, under fixed names"
    raise_together(unless(alone, "repository", repository, words))
    source = find_weights(run)
    with handing_over(model):
        net, card, report = read_backbone(run)
        if report is not None and not report.complete:
            raise ValueError(f"{source} does not have all weights of its model:\n{report}")
        card = without_paths(named_in(card, net, "safetensors")[1])
        code = parse_model_name(card.model)[0] == "custom"
        loading = "" if code else how_to("safetensors", net, card, Path(run_layout.WEIGHTS))
    page = written_page(card, run_layout.run_folder(source), place, licence, loading)
    files = {
        run_layout.WEIGHTS: save(clean_state_dict(net), metadata={"format": "pt"}),
        run_layout.CARD: card.to_json().encode(),
        PAGE: page.encode(),
    }
    if not dry_run:
        with explain_hub_errors(place):
            api = hub_api()
            add = import_extra("huggingface_hub").CommitOperationAdd
            operations = [
                add(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()
            ]
            api.create_repo(place.repo, private=private, exist_ok=True)
            if private and not api.model_info(place.repo).private:
                raise ValueError(
                    f"private is True, but {place} already exists and is public; make it private "
                    "in its settings on the Hub, or push to another name. Nothing was uploaded"
                )
            api.create_commit(place.repo, operations, commit_message="Upload a backbone")
    return Pushed(str(place), files, dry_run)


def without_paths(card: BackboneCard) -> BackboneCard:
    """The card without folders of this machine."""
    model, start = card.model, card.start
    if (file := custom_file(model)) is not None:
        model = f"{file.name}:{model.rpartition(':')[2]}"
    return replace(card, model=model, start=start if on_hub(start) else Path(start).name)


def written_page(
    card: BackboneCard, folder: Path, place: Repository, licence: str | None, loading: str
) -> str:
    """The page of a repository, from what the run's folder holds."""
    settings = read_settings_if_any(folder / run_layout.CONFIG)
    loss = settings.get("loss", "")
    method = METHODS.get(loss, "PixPro or PixContrast")
    tags = ["pixel-level-contrastive-learning", "self-supervised-learning"]
    facts = {
        "library_name": "pixel-level-contrastive-learning",
        "pipeline_tag": "image-feature-extraction",
        "tags": [*tags, loss] if loss else tags,
    } | ({} if licence is None else {"license": licence})
    data = read_settings_if_any(folder / run_layout.STATISTICS)
    images = f" on {data['images']} images" if "images" in data else ""
    size = "x".join(map(str, card.image_size))
    rows = {
        "network": f"`{card.model}`",
        "started from": card.start,
        "channels": card.channels,
        "views": f"{size} pixels",
        "pixel layer": card.pixel_layer,
        "instance layer": card.instance_layer,
    } | {name: settings[name] for name in SHOWN if settings.get(name) not in (None, "auto")}
    parts = [
        f"---\n{yaml.safe_dump(facts, sort_keys=False)}---\n\n# {place.repo.partition('/')[2]}\n\n"
        f"A backbone pretrained at pixel level, without labels,{images} by\n"
        f"`pixel-level-contrastive-learning` ({method}, [arXiv:2011.10043]"
        "(https://arxiv.org/abs/2011.10043)).\n",
        "## Use\n\n```python\nfrom pixel_level_contrastive_learning import load_backbone\n\n"
        f"net = load_backbone({str(place)!r}{', model=...' * (not loading)})\n```\n",
        f"Without the package, from a downloaded `{run_layout.WEIGHTS}`:\n\n"
        f"```python\n{loading}```\n"
        if loading
        else f"The network is built by its author's code, `{card.model}`.\n",
        "## Training\n\n" + table(["setting", "value"], [[*row] for row in rows.items()]),
        *(evaluated(folder / name) for name in (run_layout.EVALUATION, run_layout.CORRESPONDENCE)),
        f"## Licence\n\nOf the weights: {licence or 'not stated by their owner'}. Where training "
        "started from pretrained weights, their licence applies as well.\n",
    ]
    return "\n".join(part for part in parts if part)


def evaluated(path: Path) -> str:
    """What an evaluation found, as a table; nothing where there was none."""
    if not path.is_file():
        return ""
    results = json.loads(path.read_text(encoding="utf-8"))
    figures = list(dict.fromkeys(name for row in results["rows"] for name in row["scores"]))
    rows = [
        [without_folder(row["name"])]
        + [
            "" if (score := row["scores"].get(figure)) is None else f"{score:.3f}"
            for figure in figures
        ]
        for row in results["rows"]
    ]
    title = f"## {results['protocol']} on {Path(results['data']).name}\n\n"
    return title + table(["", *figures], rows)


def without_folder(name: str) -> str:
    """The name of a row without folders of this machine, whether they exist or not."""
    if origin := re.fullmatch(r"(random weights|start) \((.+)\)", name):
        return f"{origin[1]} ({', '.join(map(without_folder, origin[2].split(', ')))})"
    if on_hub(name) or name.partition("/")[0] in LIBRARIES:
        return name
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
