"""Size of the report page and the time until it is painted, in the system's Chromium; screenshots.

    optimal-sampling generate --dataset synthetic --num-examples 2020 --top-tokens 20 \
        --output-dir outputs/big
    python benchmarks/report_page.py outputs/big --samples 200 2000
    python benchmarks/report_page.py outputs/run outputs/scores --screenshots outputs/screens

Opens each page several times in a window of its own and prints the median times from the start of
the navigation: until something is painted, until the largest part is, and until the samples are
there. Ends with one line of JSON. Needs Playwright and a Chromium (apt-get install chromium).
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright
from rich.console import Console
from rich.table import Table

from optimal_sampling.report import ReportOptions
from optimal_sampling.report.page import write_report

NAMES = ("chromium", "chromium-browser", "google-chrome")
TIMES = """() => ({
  first: performance.getEntriesByName('first-contentful-paint')[0].startTime,
  ready: performance.getEntriesByName('ready')[0].startTime,
})"""
LARGEST = """() => new Promise((resolve) => new PerformanceObserver((list) =>
  resolve(list.getEntries().at(-1).startTime)
).observe({type: 'largest-contentful-paint', buffered: true}))"""
SHOWN = "html[data-ready] #list .sample"


def measured(browser: Browser, path: Path, repeats: int) -> dict[str, float]:
    """Medians in milliseconds."""
    rows = []
    for _ in range(repeats):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(path.as_uri())
        page.wait_for_selector(SHOWN, state="attached")
        rows.append(page.evaluate(TIMES) | {"largest": page.evaluate(LARGEST)})
        page.close()
    return {name: median(row[name] for row in rows) for name in rows[0]}


def sizes_and_times(browser: Browser, runs: list[str], counts: list[int], repeats: int) -> Any:
    """A row per number of samples."""
    with TemporaryDirectory() as folder:
        for count in counts:
            path = Path(folder) / f"{count}.html"
            started = time.perf_counter()
            page = write_report(ReportOptions(runs=tuple(runs), output=str(path), samples=count))
            seconds = time.perf_counter() - started
            row = {"samples": len(page.samples), "kib": path.stat().st_size / 1024}
            yield row | {"seconds": seconds} | measured(browser, path, repeats)


def screenshots(browser: Browser, runs: list[str], folder: Path) -> None:
    """The start of the page, its charts and its samples: light and dark, wide and narrow."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "page.html"
    write_report(ReportOptions(runs=tuple(runs), output=str(path)))
    for scheme in ("light", "dark"):
        for width, height in ((1280, 900), (390, 844)):
            context = browser.new_context(
                color_scheme=scheme, viewport={"width": width, "height": height}
            )
            page = context.new_page()
            page.goto(path.as_uri())
            page.wait_for_selector(SHOWN, state="attached")
            for section in ("page", "scores", "charts", "samples"):
                shoot(page, section, folder / f"{section}-{scheme}-{width}.png")
            context.close()


def shoot(page: Page, section: str, path: Path) -> None:
    """A section as one sees it; in that of the samples, one token under the pointer."""
    found = page.locator(f"#{section}")
    if not found.count():
        return
    found.evaluate("node => node.scrollIntoView({behavior: 'instant'})")
    page.wait_for_timeout(300)
    token = page.locator(".sample .t:is(.h5, .h6, .h7, .s5, .a4, .a5)").first
    if section == "samples" and token.count():
        token.focus()
        page.locator("#card").wait_for(state="visible")
    page.screenshot(path=path)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--samples", nargs="*", type=int, default=[200])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--screenshots", type=Path)
    options = parser.parse_args()
    path = next(filter(None, map(shutil.which, NAMES)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        if options.screenshots:
            screenshots(browser, options.runs, options.screenshots)
            return
        rows = list(sizes_and_times(browser, options.runs, options.samples, options.repeats))
        version = browser.version
    table = Table(
        title=f"Chromium {version}; milliseconds from the start, medians of {options.repeats}"
    )
    for name in ("samples", "KiB", "written, s", "first paint", "largest paint", "samples there"):
        table.add_column(name, justify="right")
    for row in rows:
        times = [f"{row[name]:.0f}" for name in ("first", "largest", "ready")]
        table.add_row(str(row["samples"]), f"{row['kib']:.0f}", f"{row['seconds']:.1f}", *times)
    Console().print(table)
    print(json.dumps({"chromium": version, "rows": rows}))


if __name__ == "__main__":
    main()
