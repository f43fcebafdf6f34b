#!/usr/bin/env python
"""The documentation as a site: README, docs/ and a reference from the docstrings, with every link checked.

    uv run --isolated --only-group docs python .ci/site.py [FOLDER]      # build/site; open FOLDER/index.html

The pages are those of the repository, in the same folders, so their links are the same here and on a git host. The
site needs no network: a page that would load a script, font or picture from elsewhere is refused.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[1]
SHOWN = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs", "examples", "benchmarks", "src")
KINDS = {".md", ".py", ".yaml", ".json", ".csv", ".png", ".toml", ".webp"}
MARK = ".site-of-cmapkd"  # only a folder that has it is replaced
REFERENCE = {  # page: what its reader looks for, and the modules that it shows
    "python": ("Distil, load, use", ["cmapkd.api", "cmapkd.own_loop", "cmapkd.results", "cmapkd.models.embedding"]),
    "data": ("Data", ["cmapkd.data.open", "cmapkd.data.types", "cmapkd.data.views"]),
    "models": ("Models", ["cmapkd.models.base", "cmapkd.models.types", "cmapkd.models.teacher", "cmapkd.models.load"]),
    "methods": ("Methods", ["cmapkd.methods.contract", "cmapkd.methods.terms", "cmapkd.methods.step"]),
    "objectives": ("Losses", ["cmapkd.objectives"]),
    "features": ("Levels, projections, banks", ["cmapkd.features"]),
    "evaluation": ("Evaluation", ["cmapkd.evaluation", "cmapkd.evaluation.retrieval", "cmapkd.evaluation.vqa"]),
    "compare": ("Comparisons", ["cmapkd.compare", "cmapkd.compare.statistics"]),
    "export": ("Export", ["cmapkd.export.write", "cmapkd.export.library"]),
}


def main(out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder)
        shutil.copy(ROOT / "zensical.toml", stage)
        copy_pages(stage / "pages")
        write_reference(stage / "pages" / "reference")
        command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
        done = subprocess.run(command, cwd=stage, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            sys.exit(done.stdout + "the site was not built: its builder's words are above")
        drop_shim(stage / "site")
        if complaints := sorted(check(stage / "site") | check_reference(stage / "site" / "reference")):
            sys.exit("\n".join([*complaints, f"the site was not built: {len(complaints)} complaints"]))
        if out.exists():
            if any(out.iterdir()) and not (out / MARK).is_file():
                sys.exit(f"{out} holds something else than a site: name another folder")
            shutil.rmtree(out)
        (stage / "site" / MARK).touch()
        shutil.copytree(stage / "site", out)
    print(f"site: {len(list(out.rglob('*.html')))} pages, every link checked: {out / 'index.html'}")


def copy_pages(to: Path) -> None:
    """The repository's own files, as git knows them: nothing that lies about in the folder."""
    listed = subprocess.run(["git", "ls-files", "--", *SHOWN], cwd=ROOT, text=True, check=True, stdout=subprocess.PIPE)
    for name in listed.stdout.splitlines():
        path = to / name
        if path.suffix in KINDS and (ROOT / name).is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, path)


def write_reference(to: Path) -> None:
    to.mkdir()
    for page, (title, modules) in REFERENCE.items():
        blocks = "\n\n".join(f"::: {module}" for module in modules)
        (to / f"{page}.md").write_text(f"# {title}\n\n{blocks}\n", encoding="utf-8")


def drop_shim(site: Path) -> None:
    """Takes out the builder's one script from elsewhere. It serves only the search in pages opened without a server."""
    shim = '<script src="https://unpkg.com/iframe-worker/shim"></script>'
    for path in site.rglob("*.html"):
        path.write_text(path.read_text(encoding="utf-8").replace(shim, ""), encoding="utf-8")


class Page(HTMLParser):
    """The links of a page, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "a" and (link := values.get("href")):
            self.links.add(link)
        elif tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload"):
            self.loaded.add(values.get("href") or "")
        elif tag in ("script", "img", "iframe") and (source := values.get("src")):
            self.loaded.add(source)


def check(site: Path) -> set[str]:
    """What leads nowhere, or is loaded from elsewhere. The builder checks links among pages, with their headings."""
    complaints = set()
    for path in site.rglob("*.html"):
        page = Page(path)
        name = path.relative_to(site)
        complaints |= {f"{name}: loads {link} from elsewhere" for link in page.loaded if urlsplit(link).netloc}
        for link in page.links | page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or not parts.path or path.name == "404.html":
                continue
            target = path.parent / unquote(parts.path)
            if not target.is_file():
                complaints.add(f"{name}: {link} does not exist")
    return complaints


def check_reference(folder: Path) -> set[str]:
    """Modules of which the reference shows no class and no function."""
    shown = {page: (folder / f"{page}.html").read_text(encoding="utf-8") for page in REFERENCE}
    return {
        f"reference/{page}.html shows nothing of {module}"
        for page, (_, modules) in REFERENCE.items()
        for module in modules
        if f'id="{module}.' not in shown[page]
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "site")
