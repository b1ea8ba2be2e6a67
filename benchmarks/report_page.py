"""Size of the report page and the time until it is painted, in the system's Chromium; screenshots.

    optimal-sampling generate --dataset synthetic --num-examples 2020 --top-tokens 20 \
        --output-dir outputs/big
    python benchmarks/report_page.py outputs/big --samples 200 2000
    python benchmarks/report_page.py outputs/big --copies 10000 100000
    python benchmarks/report_page.py outputs/run outputs/scores --screenshots outputs/screens

Opens each page several times in a window of its own and prints the median times from the start of
the navigation: until something is painted, until the largest part is, and until the samples are
there. `--copies` writes the page of that many copies of the records of the first run, in a process
each, and prints its time and most memory. Ends with one line of JSON. Needs Playwright and a
Chromium (apt-get install chromium).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from playwright.sync_api import Browser, Page, sync_playwright
from rich.console import Console
from rich.table import Table

from optimal_sampling.records import load
from optimal_sampling.records.store import Line, Scan, encode_line
from optimal_sampling.records.verdicts import Graded, VerdictFile
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
MEASURED = """
import resource, sys
from optimal_sampling.report import ReportOptions
from optimal_sampling.report.page import write_report
write_report(ReportOptions(runs=(sys.argv[1],), output=sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
Row = dict[str, float]
"""Numbers by name."""

SHOWN = "html[data-ready] #list .sample"


def measured(browser: Browser, path: Path, repeats: int) -> Row:
    """Medians in milliseconds."""
    rows = []
    for _ in range(repeats):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(path.as_uri())
        page.wait_for_selector(SHOWN, state="attached")
        rows.append(page.evaluate(TIMES) | {"largest": page.evaluate(LARGEST)})
        page.close()
    return {name: median(row[name] for row in rows) for name in rows[0]}


def sizes_and_times(
    browser: Browser, runs: list[str], counts: list[int], repeats: int
) -> Iterator[Row]:
    """A row per number of samples."""
    with TemporaryDirectory() as folder:
        for count in counts:
            path = Path(folder) / f"{count}.html"
            started = time.perf_counter()
            page = write_report(ReportOptions(runs=tuple(runs), output=str(path), samples=count))
            seconds = time.perf_counter() - started
            row = {"samples": len(page.samples), "kib": path.stat().st_size / 1024}
            yield row | {"written_s": seconds} | measured(browser, path, repeats)


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


def sizes_and_memory(run: str, counts: list[int]) -> Iterator[Row]:
    """A row per number of records."""
    for count in counts:
        with TemporaryDirectory() as folder:
            copies = Path(folder) / "run"
            size = copy_records(Path(run), copies, count)
            started = time.perf_counter()
            command = [sys.executable, "-c", MEASURED, str(copies), f"{folder}/page.html"]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            seconds = time.perf_counter() - started
            yield {"records": count, "mib": size, "seconds": seconds, "most_mib": float(said)}


def copy_records(source: Path, target: Path, count: int) -> float:
    """Records of their own rows, in turn those of `source`, all correct; MiB of records."""
    records = list(load(source))
    (target / "records").mkdir(parents=True)
    shutil.copy(source / "config.json", target)
    path = target / "records" / "main.jsonl"
    with path.open("wb") as file:
        for row in range(count):
            record = {**records[row % len(records)], "id": f"{row:032x}", "row_index": row}
            file.write(encode_line(record))
    with VerdictFile(target, path.stem) as verdicts:
        for line in Scan(path).lines():
            verdicts.append(verdict_on(line))
    return path.stat().st_size / 2**20


def verdict_on(line: Line) -> Graded:
    """That it is correct."""
    return Graded(
        id=line.record["id"],
        sample_index=line.record["sample_index"],
        verdict="correct",
        answer="12",
        reference="12",
        grader="math",
        record=line.checksum,
        detail=None,
        failed=False,
    )


def show(title: str, rows: list[Row]) -> None:
    """A table, and one line of JSON."""
    table = Table(*rows[0], title=title)
    for row in rows:
        cells = (f"{value:.1f}" if isinstance(value, float) else value for value in row.values())
        table.add_row(*map(str, cells))
    Console().print(table)
    print(json.dumps({"title": title, "rows": rows}))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--samples", nargs="*", type=int, default=[200])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--copies", nargs="*", type=int, default=[])
    parser.add_argument("--screenshots", type=Path)
    options = parser.parse_args()
    if options.copies:
        show("the page of many records", list(sizes_and_memory(options.runs[0], options.copies)))
        return
    path = next(filter(None, map(shutil.which, NAMES)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        if options.screenshots:
            screenshots(browser, options.runs, options.screenshots)
            return
        rows = list(sizes_and_times(browser, options.runs, options.samples, options.repeats))
        title = f"Chromium {browser.version}; times in ms, medians of {options.repeats}"
    show(title, rows)


if __name__ == "__main__":
    main()
