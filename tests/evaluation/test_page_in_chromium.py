"""The page of a report in a browser: no error, no picture without size, nothing cut, wide or on top of each other."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import reported

from bnn.evaluation import page, pictures

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no program chromium on PATH (Debian: apt-get install chromium)"
)

# Runs in a copy of the page, inside a frame of the width asked for, and tells the page around it what it measured.
MEASURE = """
<script>
addEventListener("load", () => {
  const box = (e) => e.getBoundingClientRect();
  const meets = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 0.5
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2.5;
  const pictures = [...document.querySelectorAll("svg")];
  const texts = pictures.map((svg) => [...svg.querySelectorAll("text")].map((t) => [t.textContent, box(t)]));
  const found = {
    width: innerWidth,
    scroll: document.documentElement.scrollWidth,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    paper: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
    papers: pictures.map((svg) => getComputedStyle(svg.querySelector("rect")).fill),
    sizes: pictures.map((svg) => [box(svg).width, box(svg).height]),
    marks: pictures.map((svg) => [...svg.querySelectorAll("path")].filter((p) => box(p).width + box(p).height > 0).length),
    cut: pictures.flatMap((svg, i) => texts[i].filter(([, b]) => b.left < box(svg).left || b.right > box(svg).right
      || b.top < box(svg).top || b.bottom > box(svg).bottom).map(([t]) => t)),
    touching: texts.flatMap((all) => all.flatMap(([t, a], i) => all.slice(i + 1).filter(([, b]) => meets(a, b))
      .map(([u]) => t + " / " + u))),
    scrolling: [...document.querySelectorAll(".scroll")].map((e) => [e.scrollWidth, e.clientWidth, box(e).right]),
    fetched: performance.getEntriesByType("resource").map((e) => e.name),
  };
  parent.postMessage(JSON.stringify(found), "*");
});
</script>
"""
AROUND = """<!doctype html><meta charset="utf-8"><body style="margin:0"><iframe src="page.html" width="{width}" height="900"
style="border:0"></iframe><pre id="found"></pre><script>
addEventListener("message", (e) => {{ document.getElementById("found").textContent = e.data; }});
</script>"""


class Opened(NamedTuple):
    found: dict[str, Any]
    errors: list[str]  # of the console


def browse(*options: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run headless Chromium with a profile of its own, without network."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={cwd / 'profile'}", "--enable-logging=stderr", "--v=0", "--virtual-time-budget=5000", *options,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=cwd)


@pytest.fixture
def open_page(tmp_path: Path) -> Callable[..., Opened]:
    """Open a page, in a frame so wide, in a colour scheme; measure it."""

    def opened(text: str, *, width: int = 1200, dark: bool = False) -> Opened:
        (tmp_path / "page.html").write_text(text.replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
        (tmp_path / "around.html").write_text(AROUND.format(width=width), encoding="utf-8")
        scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        result = browse(
            scheme, "--window-size=1400,1000", "--dump-dom", (tmp_path / "around.html").as_uri(), cwd=tmp_path
        )
        told = re.search(r'<pre id="found">(.+?)</pre>', result.stdout, re.DOTALL)
        assert told, f"the page was not measured: {result.stderr[-2000:]}"
        errors = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
        return Opened(json.loads(html.unescape(told[1])), errors)

    return opened


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    long = "banks/experiments/2026/digits-mean-field-with-a-name-that-goes-on-for-a-while"
    return {
        "two banks": page.render(reported.banks(("hmc", long))),
        "one bank": page.render({"hmc": reported.classification(ood=False)}),
        "regression": page.render(
            {"wide": reported.regression(verdict="good"), "narrow": reported.regression(seed=4, noise=2.0)}
        ),
    }


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400])
@pytest.mark.parametrize("which", ["two banks", "one bank", "regression"])
def test_the_page_opens(
    pages: dict[str, str], which: str, width: int, dark: bool, open_page: Callable[..., Opened]
) -> None:
    found, errors = open_page(pages[which], width=width, dark=dark)
    assert errors == []
    assert found["fetched"] == []
    assert found["width"] == width
    assert found["scroll"] <= width
    assert found["dark"] is dark
    assert found["sizes"]
    assert all(wide > 250 and high > 100 for wide, high in found["sizes"])
    assert all(number >= 3 for number in found["marks"])
    assert found["cut"] == []
    assert found["touching"] == []
    assert all(right <= width for _, _, right in found["scrolling"])
    assert found["paper"] == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
    assert set(found["papers"]) == {found["paper"]}


def test_wide_tables_scroll_in_their_own_box(pages: dict[str, str], open_page: Callable[..., Opened]) -> None:
    found, _ = open_page(pages["two banks"], width=400)
    assert any(inner > outer for inner, outer, _ in found["scrolling"])


def test_a_picture_in_a_file_of_its_own_opens(tmp_path: Path) -> None:
    """On its own paper, in both schemes: a screenshot of each is a PNG, and they differ."""
    picture = tmp_path / "one.svg"
    picture.write_text(pictures.draw(reported.classification())["reliability"], encoding="utf-8")
    shots = []
    for scheme in (0, 1):
        shot = tmp_path / f"{scheme}.png"
        result = browse(
            f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={shot}", "--window-size=400,400", picture.as_uri(), cwd=tmp_path
        )  # fmt: skip
        assert "CONSOLE" not in result.stderr
        shots.append(shot.read_bytes())
    assert all(shot.startswith(b"\x89PNG") for shot in shots)
    assert shots[0] != shots[1]


def test_what_is_wrong_is_noticed(open_page: Callable[..., Opened]) -> None:
    """The measures above can fail: an error of a script, a wide box, a label past the edge, two labels at one place."""
    text = page.render({"hmc": reported.classification()})
    text = text.replace("</body>", '<div style="width:3000px">x</div><script>nonsense()</script></body>')
    text = text.replace("</svg>", '<text x="350" y="20">far too long</text><text x="9" y="20">on top</text></svg>', 1)
    found, errors = open_page(text)
    assert any("nonsense" in line for line in errors)
    assert found["scroll"] > 1200
    assert "far too long" in found["cut"]
    assert any("on top" in pair for pair in found["touching"])
