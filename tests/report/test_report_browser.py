"""A report in a real browser: hostile text runs nothing, nothing is asked of a network, it fits phones and prints."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from PIL import Image
from report_support import HOSTILE, write_pictures, write_run

from cmapkd.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium")


def browse(profile: Path, page: Path, *options: str, width: int = 1100, height: int = 1600) -> str:
    assert BROWSER is not None
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking"]
    window = [f"--user-data-dir={profile}", f"--window-size={width},{height}", "--virtual-time-budget=2000"]
    done = subprocess.run(
        [BROWSER, *flags, *window, *options, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


@pytest.fixture(scope="module")
def asked() -> Iterator[tuple[str, list[str]]]:
    """The address of a server, and what was asked of it."""
    paths: list[str] = []

    class Listening(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing into the tests' output."""

    server = HTTPServer(("127.0.0.1", 0), Listening)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", paths
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, asked: tuple[str, list[str]]) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    calls = (f'<img src="{asked[0]}/img">', f"<style>@import url({asked[0]}/css);</style>", f"url({asked[0]}/text)")
    source = write_pictures(folder, captions=(*calls, *HOSTILE))
    run = write_run(folder / "run <b>name", source=source)
    return write_report([run], folder / "report.html", gallery=3)


def test_strangers_text_runs_nothing_and_asks_for_nothing(
    page: Path, asked: tuple[str, list[str]], tmp_path: Path
) -> None:
    shown = browse(tmp_path / "p", page, "--dump-dom")
    title = re.search(r"<title>(.*?)</title>", shown)
    assert title is not None
    assert title[1] == "run &lt;b&gt;name: report"
    assert "cards shown" in shown  # the page's own script ran
    assert asked[1] == []
    planted = page.with_name("planted.html")  # the policy holds even for markup that would get through
    text = page.read_text(encoding="utf-8").replace(
        "<main",
        f"<script>document.title='taken'</script><img src='{asked[0]}/x' onerror=\"document.title='taken'\"><main",
    )
    planted.write_text(text, encoding="utf-8")
    assert "<title>run &lt;b&gt;name: report</title>" in browse(tmp_path / "p", planted, "--dump-dom")
    assert asked[1] == []


@pytest.mark.parametrize("width", [390, 768, 1100])
def test_it_fits_phones_tablets_and_desks(page: Path, width: int, tmp_path: Path) -> None:
    measuring = page.with_name(f"measuring{width}.html")  # the same page with a script that measures it
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    script = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script></body>"
    measuring.write_text(text.replace("</body>", script), encoding="utf-8")
    picture = tmp_path / "page.png"
    shown = browse(tmp_path / "p", measuring, "--dump-dom", f"--screenshot={picture}", width=width)
    found = re.search(r"<title>(\d+) of (\d+)</title>", shown)
    assert found is not None
    assert int(found[1]) <= int(found[2])
    if not picture.exists():  # some versions do one thing at a time
        browse(tmp_path / "p", page, f"--screenshot={picture}", width=width)
    with Image.open(picture) as image:
        assert image.width == width
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 50


def test_it_prints_with_everything_open(page: Path, tmp_path: Path) -> None:
    browse(tmp_path / "p", page, f"--print-to-pdf={tmp_path / 'page.pdf'}")
    content = (tmp_path / "page.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", content)) > 1
    assert page.stat().st_size < 5_000_000
