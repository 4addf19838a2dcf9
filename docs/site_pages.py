"""Hooks of the site: pages from outside ``docs/``, links that work in the repository too, checks.

`mkdocs.yml` names this file. Whatever it warns of fails ``make site``.
"""

import json
import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = get_plugin_logger("site")
PACKAGE = "pixel_level_contrastive_learning"
ROOT = Path(__file__).parents[1]
ELSEWHERE = {  # file of the repository, its place on the site
    "README.md": "readme.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "propagate.png": "propagate.png",
    **{f"examples/{own.name}": f"examples/{own.name}" for own in (ROOT / "examples").glob("*.py")},
    "notebooks/own_folder.ipynb": "notebooks/own_folder.md",
    "notebooks/read_a_run.ipynb": "notebooks/read_a_run.md",
}
SOURCES = {place: source for source, place in ELSEWHERE.items()}
TARGET = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")  # of a Markdown link, without its anchor
DOCTEST = re.compile(r"^>>> (?:.+(?:\n|$))+", re.MULTILINE)
FLAG = re.compile(r" *# doctest: .*")
BLOCK = re.compile(r"^::: (\S+)$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages and pictures that lie outside ``docs/``."""
    for source, place in ELSEWHERE.items():
        path = ROOT / source
        if path.suffix == ".ipynb":
            files.append(File.generated(config, source, abs_src_path=str(path)))
            files.append(File.generated(config, place, content=as_page(path)))
        else:
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def as_page(notebook: Path) -> str:
    """A notebook as Markdown, below its title a link to the file."""
    title, *cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    link = f'<a href="{notebook.name}" download>Download this notebook</a>'
    texts = ["".join(title["source"]), link]
    for cell in cells:
        text = "".join(cell["source"])
        texts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
    return "\n\n".join(texts)


def on_page_markdown(text: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """The page with links between the site's places; the reference is checked."""
    place = page.file.src_uri
    source = SOURCES.get(place, f"docs/{place}")
    if place == "api.md":
        check_reference(BLOCK.findall(text))
    return TARGET.sub(lambda match: rebased(match[1], source, place), text)


def rebased(link: str, source: str, place: str) -> str:
    """A link of the repository's file ``source``, as its page at ``place`` must write it."""
    target = normpath(join(dirname(source), link))
    if not (ROOT / target).exists():
        log.warning("%s links to %s, which the repository lacks", source, link)
    return relpath(ELSEWHERE.get(target, target.removeprefix("docs/")), dirname(place) or ".")


class Examples(griffe.Extension):
    """Doctests as code: Markdown would take their ``>>>`` for quotations."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            fenced = "```pycon\n{}\n```\n"
            obj.docstring.value = DOCTEST.sub(
                lambda match: fenced.format(FLAG.sub("", match[0]).rstrip()), obj.docstring.value
            )


def check_reference(names: list[str]) -> None:
    """Warns of a public name that the reference leaves out, and of one without a docstring."""
    package = griffe.load(PACKAGE, search_paths=[ROOT], resolve_aliases=True)
    for name in package.exports or ():
        if f"{PACKAGE}.{name}" not in names:
            log.warning("api.md leaves out the public name %s", name)
    for path in names:
        check_docstrings(package[path.removeprefix(f"{PACKAGE}.")])


def check_docstrings(item: griffe.Object | griffe.Alias) -> None:
    """Warns of everything public in a module, class or function that has no docstring."""
    if not item.has_docstring:
        log.warning("%s has no docstring", item.path)
    bases = item.mro() if item.is_class else []
    described = {
        name for base in bases for name, member in base.members.items() if member.docstring
    }
    for name, member in item.members.items():
        shown = not name.startswith("_") and name != "forward" and not member.is_alias
        if shown and name not in described and (member.is_class or member.is_function):
            check_docstrings(member)
