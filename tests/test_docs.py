"""The docs: every measured number is its file's, and every link leads somewhere."""

from __future__ import annotations

import importlib
import re
import runpy
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cmapkd.compare import load_comparison, make_plan
from cmapkd.config import load_config
from cmapkd.data import records
from cmapkd.data.open import open_source
from cmapkd.models import build_model
from cmapkd.run import RunConfig

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
SITE_KINDS = runpy.run_path(str(ROOT / ".ci" / "site.py"), run_name="site")["KINDS"]

with pytest.MonkeyPatch.context() as patched:
    patched.syspath_prepend(ROOT / "benchmarks")
    measured = importlib.import_module("measured")
    tables = importlib.import_module("tables")


# ------------------------------------------------------------------------------------------------ numbers


def test_every_measured_number_of_the_docs_is_its_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main([]) == 0, capsys.readouterr().err


def test_the_demo_has_the_setting_of_the_runs_that_the_readme_shows() -> None:
    demo = load_config(RunConfig, "demo")
    plan = make_plan(load_comparison(ROOT / "examples" / "demo.yaml"))
    for method, expected in (("cmapkd", demo.plain()), ("contrastive", demo.scratch().plain())):
        (shown,) = (run.config.plain() for run in plan.runs if (run.config.method.name, run.config.seed) == (method, 0))
        expected["baseline"] = "none"  # which is run beside
        expected["data"]["val"] = None  # which is looked at on the way
        expected["training"]["evaluate_every"] = None
        assert shown == expected


def test_sizes_of_the_presets_are_the_models() -> None:
    page = (ROOT / "docs" / "scenes.md").read_text(encoding="utf-8")
    world = open_source("scenes?length=1000")  # the words of all captions are in so few
    captions = [caption for index in range(len(world)) for caption in world[index].captions]
    for preset in ("tiny:base", "tiny:small"):
        count = sum(parameter.numel() for parameter in build_model(preset, captions=captions).parameters())
        assert f"| `{preset}` | {count:,} |" in page


TIED = """Three seeds: exploratory, uncorrected.

<!-- table: fitnet.csv
rows: {KD: no hint}
columns:
- of(R1)
- of(R1) - of(R1, arm="no hint")
-->
| arm | R@1 | difference |
| --- | ---: | ---: |
| KD | 3.6 ± 1.7 | |
| **hint, then KD** | **4.9 ± 0.3** | +1.3 [−2.6, 5.2], 2/3 |
"""


def complaints(tmp_path: Path, text: str, *, write: bool = False) -> list[str]:
    path = tmp_path / "page.md"
    path.write_text(text, encoding="utf-8")
    return tables.check_tables(path, write=write)


def test_a_tied_table_with_its_files_numbers_passes(tmp_path: Path) -> None:
    assert complaints(tmp_path, TIED) == []


@pytest.mark.parametrize(
    ("right", "wrong", "told"),
    [
        ("4.9 ± 0.3", "4.9 ± 0.4", "'**4.9 ± 0.4**' should be '4.9 ± 0.3'"),
        ("2/3 |", "3/3 |", "should be '+1.3 [−2.6, 5.2], 2/3'"),
        ("KD: no hint", "KD: no such arm", "no row holds {'arm': 'no such arm'}"),
        ("fitnet.csv", "fitnet_2.csv", "docs/results has no fitnet_2.csv"),
        ("- of(R1)\n-", "-", "2 cells after the first, its tie 1"),
        ("exploratory, ", "", "must say: exploratory, uncorrected"),
        ("of(R1)\n", "open('x')\n", "is not allowed"),
        ("of(R1)\n", "of(R1).__class__\n", "is not allowed"),
    ],
)
def test_what_a_table_must_not_say(tmp_path: Path, right: str, wrong: str, told: str) -> None:
    [found] = complaints(tmp_path, TIED.replace(right, wrong, 1))
    assert told in found
    assert found.startswith("page.md:")


def test_writing_puts_numbers_right_and_keeps_what_is_bold(tmp_path: Path) -> None:
    assert complaints(tmp_path, TIED.replace("4.9 ± 0.3", "1").replace("2/3 |", "3/3 |"), write=True) == []
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == TIED


@pytest.mark.parametrize(
    ("above", "told"),
    [
        ("", "a table with numbers and no tie"),
        ("<!-- facts -->", None),
        ("<!-- machine: soak.json; one long run -->", None),
        ("<!-- machine: soak.json -->", "says why"),
        ("<!-- machine: none.json; one long run -->", "docs/results has no none.json"),
    ],
)
def test_a_table_with_numbers_has_a_tie_or_a_mark(tmp_path: Path, above: str, told: str | None) -> None:
    found = complaints(tmp_path, f"{above}\n| a | b |\n| --- | --- |\n| x | 3 |\n")
    assert (told in found[0]) if told else not found


CONTRASTS = """\
<!-- contrasts: sgva_clip.json -->
| contrast | metric | difference | smallest | verdict |
| --- | --- | ---: | ---: | --- |
| sgva_clip − prompts alone | `zero_shot.top1` | +6.3 [4.5, 8.2] | ± 1 | above |
| sgva_clip − adapter without distillation | `novel.zero_shot.top1` | −2.0 [−4.1, 0.2] | ± 1 | not resolved |
| pictures alone − sgva_clip | `novel.zero_shot.top1` | −19.8 [−22.7, −17.0] | ± 2 | below |
"""


@pytest.mark.parametrize(
    ("right", "wrong", "told"),
    [
        ("+6.3", "+6.4", "should be '+6.3 [4.5, 8.2]'"),
        ("above", "equal", "'equal' should be 'above'"),
        ("| pictures alone", "pictures alone", "each declared contrast of sgva_clip.json once: "),
        ("sgva_clip − prompts", "sgva_clip − nobody's", "each declared contrast of sgva_clip.json once: "),
    ],
)
def test_a_table_of_contrasts_has_all_of_them(tmp_path: Path, right: str, wrong: str, told: str) -> None:
    assert complaints(tmp_path, CONTRASTS) == []
    assert told in complaints(tmp_path, CONTRASTS.replace(right, wrong))[0]


def test_tables_of_words_and_tables_in_code_need_no_mark(tmp_path: Path) -> None:
    table = "| a | b |\n| --- | --- |\n| 1 | {} |\n"
    assert complaints(tmp_path, table.format("`3` of [one](https://example.org/2.0)")) == []
    assert complaints(tmp_path, f"```\n{table.format('3')}```\n") == []


@pytest.mark.parametrize(
    ("text", "entry", "told"),
    [
        ("It has 3.6 of R@1.", {}, "has no claim"),
        ("It has 36 % of it.", {}, "has no claim"),
        ("Of `a.b=3.6`, [it](x3.6), 3 steps.", {}, None),
        ("It has 3.6 of R@1.", {"facts": ["3.6 of R@1"]}, None),
        ("It has 3.6.", {"facts": ["3.7"]}, "the fact '3.7'"),
        ("It has 3.6 of R@1.", {"claims": [{"says": "has {of(R1, arm='no hint').mean} of"}]}, None),
        ("It has 3.7 of R@1.", {"claims": [{"says": "has {of(R1, arm='no hint').mean} of"}]}, "say 'has 3.6 of'"),
        ("It has 3.6.", {"claims": [{"says": "has {of(R1, arm='nobody').mean}"}]}, "no row holds"),
    ],
)
def test_measured_numbers_of_prose_belong_to_a_claim(text: str, entry: dict[str, object], told: str | None) -> None:
    found = list(tables._check_claims(tables.prose(text), {"from": "fitnet.csv", **entry}, []))
    assert (told in found[0]) if told else not found


def test_scores_and_differences_are_written_as_the_docs_do() -> None:
    one, other = measured.Scores({0: 1.0, 1: 2.0, 2: 4.5}), measured.Scores({0: 1.0, 1: 1.0, 2: 1.0})
    assert f"{one}" == "2.5 ± 1.8"
    assert f"{one - other}" == "+1.5 [−3.0, 6.0], 2/3"  # 4.303 x 1.803 / sqrt(3) = 4.48
    assert f"{other - other:+.2f}" == "+0.00 (no spread in 3 seeds), 0/3"
    assert f"{measured.Scores({0: 1.0}) - measured.Scores({0: 2.0})}" == "−1.0"
    with pytest.raises(measured.UnknownNumberError, match="no seed in common"):
        one - measured.Scores({7: 1.0})


def test_a_selection_with_two_rows_of_a_seed_is_refused() -> None:
    with pytest.raises(measured.UnknownNumberError, match="more than one row of seed 0"):
        measured.Asker("demo_seeds.csv").ask("of(R1)")


# ------------------------------------------------------------------------------------------------ lines

LONGEST_LINE = 120
PAGES = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]


def long_lines(text: str) -> list[int]:
    """Numbers, from 1, of the prose lines above `LONGEST_LINE` characters: no code, table, tie of a table, picture."""
    prose = re.sub(
        r"^```.*?^```|<!--.*?-->", lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE
    )
    lines = enumerate(prose.split("\n"), start=1)
    return [number for number, line in lines if len(line) > LONGEST_LINE and not line.startswith(("|", "!["))]


def test_only_long_lines_of_prose_are_found() -> None:
    long = "x" * (LONGEST_LINE + 1)
    text = f"{long[1:]}\n{long}\n| {long} |\n\n```bash\n{long}\n```\n<!-- table: a.csv\n{long}\n-->\n- {long[1:]}\n"
    assert long_lines(text) == [2, 11]


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_prose_line_of_a_page_is_long(path: Path) -> None:
    assert long_lines(path.read_text(encoding="utf-8")) == []


def test_pages_that_compare_say_what_was_tuned() -> None:
    compared = re.compile(r"<!-- contrasts:|exploratory,\s+uncorrected")
    told = re.compile(r"\btuned\b|\btuning\b|\btrials\b|\btries\b")
    pages = [path for path in PAGES if (ROOT / "docs") in path.parents]
    texts = {str(path): path.read_text(encoding="utf-8") for path in pages}
    comparing = {name: text for name, text in texts.items() if compared.search(text)}
    assert len(comparing) > 20
    assert [name for name, text in comparing.items() if not told.search(text)] == []


# ------------------------------------------------------------------------------------------------ commands


def commands(path: Path) -> list[str]:
    """The lines of a page's first block of shell commands in which `cmapkd` is called."""
    blocks = re.findall(r"^```bash\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = [re.findall(r"^(?:.*[ /])?cmapkd .*", block, flags=re.MULTILINE) for block in blocks]
    return next((lines for lines in found if lines), [])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_first_commands_of_a_page_run_in_a_clone(path: Path) -> None:
    assert [line for line in commands(path) if line.startswith("cmapkd ")] == []


def test_an_extra_is_installed_in_one_way() -> None:
    for path in [*PAGES, *(ROOT / "examples").iterdir()]:
        text = path.read_text(encoding="utf-8")
        assert re.findall(r"uv (?:run|sync) (?!--inexact )[^`\n]*--extra", text) == [], path


def test_the_names_of_columns_are_those_that_are_found() -> None:
    rows = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").partition("<!-- names of columns -->")[2]
    table = dict(re.findall(r"^\| (\w+) \| (`.*`) \|$", rows.partition("\n\n")[0], flags=re.MULTILINE))
    told = {column: re.findall(r"`(\w+)`", names) for column, names in table.items()}
    first = {"image": ("filepath", *records.IMAGE_KEYS), "caption": ("title", *records.CAPTION_KEYS)}
    known = {**first, "label": records.LABEL_KEYS, "id": records.ID_KEYS}
    assert told == {column: [*dict.fromkeys(names)] for column, names in known.items()}


# ------------------------------------------------------------------------------------------------ links


def links(path: Path) -> Iterator[str]:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors(path: Path) -> set[str]:
    """GitHub's names of a document's headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def has_table(page: str) -> bool:
    return "<!-- table: " in page or "<!-- contrasts: " in page


def test_the_list_of_methods_without_an_effect_is_that_of_their_pages() -> None:
    text = (ROOT / "docs" / "methods.md").read_text("utf-8")
    section = text[text.index("## Measured effects") : text.index("## Left out")]
    begun = section.index("The effects of the other methods have not been measured yet")
    measured, waiting = ({*re.findall(r"methods/(\w+)\.md", part)} for part in (section[:begun], section[begun:]))
    for name in sorted(measured | waiting):
        page = (ROOT / "docs" / "methods" / f"{name}.md").read_text("utf-8")
        assert (name in waiting) == (
            "<!-- table: " not in page and "<!-- contrasts: " not in page
        ) or name == "albef", name
    assert not measured & waiting - {"albef"}  # MSD, its row, is measured


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_of_a_document_leads_somewhere(path: Path) -> None:
    for target in links(path):
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.is_file(), f"{target} is no file"  # the site has no pages for folders
        assert there.suffix in SITE_KINDS, f"{target}: .ci/site.py does not copy such files"
        assert not anchor or anchor in anchors(there), f"{target}: {there.name} has no such heading"


def listed(pages: Any) -> Iterator[str]:
    """The pages of a navigation: a list of titles, each with a page or further such lists."""
    if isinstance(pages, str):
        yield pages
    else:
        for entry in pages if isinstance(pages, list) else pages.values():
            yield from listed(entry)


def test_the_site_has_every_page() -> None:
    site = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    found = {page for page in listed(site["nav"]) if not page.startswith("reference/")}
    assert found == {str(path.relative_to(ROOT)) for path in DOCUMENTS}
