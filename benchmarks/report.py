"""Size of the report and time until its explorer is usable, for analyses of the paper's size.

    python benchmarks/report.py
    python benchmarks/report.py --runs 12

36 layers, 4 projections, r = 32, 10 angles per side, with synthetic values (benchmarks/made_analysis.py), which
compress worse than real ones. Needs Chromium and its driver. Time is measured from the start of the navigation to the
second frame after the explorer has drawn its visible numbers and plots; the slowest of three runs counts.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from made_analysis import METHODS, make_analysis
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from losslens.report.page import write_report

_STEP = """
const done = arguments[0], layer = document.getElementById("x-layer"), took = [];
(function step(i) {
  if (i > 20) return done(took);
  const start = performance.now();
  layer.value = i;
  layer.dispatchEvent(new Event("input"));
  requestAnimationFrame(() => requestAnimationFrame(() => { took.push(performance.now() - start); step(i + 1); }));
})(0);
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="*", default=[6, 60])
    for count in parser.parse_args().runs:
        with tempfile.TemporaryDirectory() as folder:
            names = make_analysis(Path(folder), METHODS, seeds=max(1, count // len(METHODS)))
            start = time.perf_counter()
            report = write_report(Path(folder))
            seconds = time.perf_counter() - start
            ready, step = zip(*(_opened(report) for _ in range(3)), strict=True)
            print(
                f"{len(names)} runs, {len(names) * (len(names) - 1) // 2} pairs: written in {seconds:.1f} s, "
                f"{report.stat().st_size / 1e6:.1f} MB, usable after {max(ready):.0f} ms, "
                f"another layer after {max(step):.0f} ms"
            )


def _opened(report: Path) -> tuple[float, float]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    with tempfile.TemporaryDirectory() as profile:
        for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000"):
            options.add_argument(flag)
        options.add_argument(f"--user-data-dir={profile}")
        browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            browser.get(report.as_uri())
            mark = "return performance.getEntriesByName('explorer')[0]?.startTime"
            ready = WebDriverWait(browser, 60).until(lambda page: page.execute_script(mark))
            steps = sorted(browser.execute_async_script(_STEP))
            return ready, steps[len(steps) // 2]
        finally:
            browser.quit()


if __name__ == "__main__":
    main()
