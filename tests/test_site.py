"""The documentation as a site: what its checker refuses. The site itself is built in CI."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site() -> Any:
    spec = importlib.util.spec_from_file_location("site_builder", ROOT / ".ci" / "site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("html", "told"),
    [
        ('<a href="other.html#part">', None),
        ('<a href="https://example.org">', None),
        ('<img src="picture%20one.png">', None),
        ('<a href="nowhere.html">', "page.html: nowhere.html does not exist"),
        ('<a href="folder">', "page.html: folder does not exist"),
        ('<img src="none.png">', "page.html: none.png does not exist"),
        (
            '<script src="https://example.org/a.js"></script>',
            "page.html: loads https://example.org/a.js from elsewhere",
        ),
        ('<link rel="stylesheet" href="//example.org/a.css">', "page.html: loads //example.org/a.css from elsewhere"),
    ],
)
def test_a_page_whose_links_lead_nowhere_or_abroad_is_refused(
    html: str, told: str | None, tmp_path: Path, site: Any
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "picture one.png").touch()
    (tmp_path / "other.html").write_text("<p>", encoding="utf-8")
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    assert site.check(tmp_path) == ({told} if told else set())


def test_the_reference_shows_modules_that_exist(site: Any, tmp_path: Path) -> None:
    site.write_reference(tmp_path / "reference")
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "reference").iterdir()}
    shown = [name for text in pages.values() for name in re.findall(r"^::: (.+)$", text, flags=re.MULTILINE)]
    for name in shown:
        path = ROOT / "src" / name.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), name
    navigation = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    assert tomllib.loads(navigation)["project"]["theme"]["font"] is False  # else fonts are loaded from elsewhere
    assert set(pages) == set(re.findall(r"reference/(\w+)\.md", navigation))
