"""The Hugging Face Hub: files of a repository, named ``hf://OWNER/NAME[@REVISION][/FILE]``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

from ..checks import import_extra
from ..files import CannotWriteError
from ..run_layout import CARD, WEIGHTS, card_path

HUB = "hf://"
"""What the name of a repository begins with."""
CONFIG = "config.json"
"""What describes a network of timm or transformers in its repository."""
PREPROCESSOR = "preprocessor_config.json"
"""How images are prepared for a network of transformers."""
LIBRARY_KEYS = {"architecture", "model_type"}
"""Of these timm's has the first, that of transformers the second."""
SUFFIXES = ((".safetensors",), (".bin", ".ckpt", ".pt", ".pth"))
"""Of files of weights: those of the first kind that a repository has are looked at."""
USUAL = ("model.safetensors", "pytorch_model.bin")
"""What timm and transformers call the weights; other files may lie beside them."""
PLACE = re.compile(
    r"(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<file>.*))?"
)
"""A repository, a revision and a file; a pull request is ``refs/pr/3``."""


class Repository(NamedTuple):
    """A repository at a revision (None: its newest), and a file in it (None: the usual one)."""

    repo: str
    revision: str | None
    file: str | None

    def __str__(self) -> str:
        return f"{HUB}{self.repo}{f'@{self.revision}' if self.revision else ''}"


def on_hub(name: object) -> bool:
    """Whether a name is that of a repository on the Hub."""
    return str(name).startswith(HUB)


def place_of(name: str) -> Repository:
    """The repository and the file that a name leads to."""
    found = PLACE.fullmatch(name.removeprefix(HUB))
    if found is None:
        raise ValueError(f"{name!r} is no repository; give {HUB}OWNER/NAME or {HUB}OWNER/NAME/FILE")
    return Repository(found["repo"], found["revision"], found["file"] or None)


def hub_api() -> Any:
    """The client of the Hub, which keeps what it downloads and knows who is logged in."""
    return import_extra("huggingface_hub").HfApi()


def http_client() -> Any:
    """The library that it talks to the Hub with, which has errors of its own."""
    return import_extra("huggingface_hub.utils").httpx


@contextmanager
def explain_hub_errors(place: Repository) -> Iterator[None]:
    """Say what to do where a repository cannot be read or written."""
    errors, client = import_extra("huggingface_hub.errors"), http_client()
    page = f"https://huggingface.co/{place.repo}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{place} requires agreeing to its terms: agree on {page}, then log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"there is no repository {place.repo} on the Hub, or it is private; check the name on "
            f"{page}, and for a private one log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(
            f"there is no {place}; for the revisions see {page}/commits (for a branch with a slash "
            "in its name, give its commit)"
        ) from error
    except errors.HFValidationError as error:
        raise ValueError(f"{place} is not a valid repository name: {error}") from error
    except (client.HTTPError, OSError) as error:
        # Where a file is not in the cache either, the cause holds what the Hub answered.
        status = status_of(error) or status_of(error.__cause__)
        if status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise ConnectionError(
                f"the Hub does not serve {place} at the moment: {error}; try again later"
            ) from error
        if status or isinstance(error, errors.LocalTokenNotFoundError):
            raise ValueError(
                f"the Hub refuses {place}: {error}; log in with `hf auth login`, or set HF_TOKEN "
                "to a token with this permission"
            ) from error
        # A connection that fails has no errno, or is one of these two.
        if getattr(error, "errno", None) and not isinstance(error, (ConnectionError, TimeoutError)):
            raise CannotWriteError(
                f"{place} could not be cached: {error}; free disk space, or set HF_HOME to a "
                "writable folder"
            ) from error
        raise ConnectionError(
            f"{place} could not be reached: {error}; check the connection and HF_HUB_OFFLINE, or "
            "download the files on another machine and give their path"
        ) from error


def status_of(error: BaseException | None) -> int:
    """The status that the Hub answered with; 0 where it did not answer."""
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def files_of(place: Repository) -> list[str]:
    """The files of a repository; without a connection those that were downloaded before."""
    errors, client, api = import_extra("huggingface_hub.errors"), http_client(), hub_api()
    with explain_hub_errors(place):
        try:
            return list(api.list_repo_files(place.repo, revision=place.revision))
        except (errors.OfflineModeIsEnabled, client.HTTPError) as error:
            if isinstance(error, errors.HfHubHTTPError):  # the Hub did answer
                raise
            kept = {"revision": place.revision, "local_files_only": True}
            folder = Path(api.snapshot_download(place.repo, **kept))
            return [str(f.relative_to(folder)) for f in sorted(folder.rglob("*")) if f.is_file()]


def fetch(place: Repository, file: str) -> Path:
    """A file of a repository in the cache, where it is downloaded to once."""
    with explain_hub_errors(place):
        return Path(hub_api().hf_hub_download(place.repo, file, revision=place.revision))


def fetch_weights(name: str) -> Path:
    """The file of weights that a name leads to; the card beside it is fetched, too.

    Raises:
        ValueError: No such repository or file, no weights, or several and none is named.
        ConnectionError: The Hub cannot be reached, and the file is not in the cache.
        CannotWriteError: The cache cannot be written.
    """
    place = place_of(name)
    files = files_of(place)
    file = place.file or only_weights(place, files)
    if file not in files:
        raise ValueError(f"{place} has no file {file}; it has {', '.join(files) or 'no files'}")
    card = card_path(Path(file)).as_posix()
    if card in files:
        fetch(place, card)
    return fetch(place, file)


def only_weights(place: Repository, files: list[str]) -> str:
    """The file of weights of a repository: ours, the usual one, or the only one of its kind."""
    if {CARD, WEIGHTS} <= {*files}:
        return WEIGHTS
    if usual := next((file for file in USUAL if file in files), None):
        return usual
    kinds = ([file for file in files if file.endswith(suffixes)] for suffixes in SUFFIXES)
    found: list[str] = next(filter(None, kinds), [])
    if any(re.search(r"-\d{5}-of-\d{5}\.", file) for file in found):
        raise ValueError(
            f"{place} has sharded weights, which are not supported; merge them into one"
        )
    if len(found) == 1:
        return found[0]
    what = f"has several files of weights: {', '.join(found)}" if found else "has no weights"
    example = f"{place}/{found[0] if found else 'FILE'}"
    raise ValueError(f"{place} {what}; name a file as weights: --weights {example}")


@lru_cache(maxsize=16)
def hub_config(name: str) -> dict[str, Any]:
    """What describes the network of a repository: our card, or timm's or transformers' settings.

    Raises:
        ValueError: No such repository, or nothing of these in it.
        ConnectionError: The Hub cannot be reached, and the file is not in the cache.
        CannotWriteError: The cache cannot be written.
    """
    place = place_of(name)
    files = files_of(place)
    for file in (CARD, CONFIG):
        if file in files:
            config = read_json(place, file)
            if isinstance(config, dict) and (is_card(config) or LIBRARY_KEYS & config.keys()):
                return config
    raise ValueError(
        f"{place} describes no network: it has neither a {CARD} of `pixelcl export --push` nor a "
        f"{CONFIG} of timm or transformers; choose the network with --model and its weights with "
        f"--weights {place}"
    )


def preprocessor(place: Repository) -> dict[str, Any] | None:
    """How images are prepared for a network of transformers; None where that is not said."""
    return read_json(place, PREPROCESSOR) if PREPROCESSOR in files_of(place) else None


def read_json(place: Repository, file: str) -> Any:
    """What a JSON file of a repository holds."""
    return json.loads(fetch(place, file).read_text(encoding="utf-8"))


def is_card(config: dict[str, Any]) -> bool:
    """Whether what describes a network is a card of ours."""
    return "model" in config and LIBRARY_KEYS.isdisjoint(config)
