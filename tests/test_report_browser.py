"""The report as a reader has it: a file on the disk, opened in a browser without a network."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from benchmarks.made_analysis import make_analysis
from losslens.losses import builtin_losses
from losslens.measures import weight_measures
from losslens.report.page import write_report

pytestmark = pytest.mark.browser

EVIL = "<img src=x onerror=document.title='evil'>"
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1400,1000",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip


@pytest.fixture(scope="module")
def analysis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("analysis")
    make_analysis(folder, methods=["sft", "rft", "dpo", EVIL], seeds=2, layers=5, top=6, rank=8)
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        assert not os.environ.get("CI"), "no Chromium: .ci/run installs it"
        pytest.skip("needs Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield found
    found.quit()


class Report:
    """The page, and what a reader does with it."""

    def __init__(self, browser: webdriver.Chrome, folder: Path) -> None:
        self.browser = browser
        self.tables = {
            **{name: pd.read_csv(folder / f"{name}.csv") for name in ("runs", "pairs", "layers", "cka", "arm_pairs")},
            **{name: pd.read_parquet(folder / f"{name}.parquet") for name in ("modules", "run_modules")},
        }
        browser.get((folder / "report.html").as_uri())
        WebDriverWait(browser, 30).until(lambda _: self.ready)
        # There may be other sections before it.
        self.look_at(browser.find_element(By.CSS_SELECTOR, "#x-modules .plot"))

    @property
    def ready(self) -> float | None:
        """Milliseconds from the start until the explorer stood on the screen."""
        return self.run("return performance.getEntriesByName('explorer')[0]?.startTime")

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def settle(self) -> None:
        """Waits until what was chosen is shown."""
        self.browser.execute_async_script(
            "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done)))"
        )

    def choose(self, which: str, name: str) -> None:
        """Chooses a run, whose name stands in full in the option's title."""
        options = self.browser.find_element(By.ID, f"x-{which}")
        places = [o.get_attribute("value") for o in Select(options).options if o.get_attribute("title") == name]
        Select(options).select_by_value(places[0])
        self.settle()

    def single_runs(self) -> None:
        self.run("document.querySelector('#x-kind input[value=runs]').click()")
        self.settle()

    def layer(self, layer: int) -> None:
        self.run(
            "const l = document.getElementById('x-layer'); l.value = arguments[0]; l.dispatchEvent(new Event('input'))",
            layer,
        )
        self.settle()

    def projection(self, name: str) -> None:
        labels = self.browser.find_elements(By.CSS_SELECTOR, "#x-projection label")
        self.run("arguments[0].click()", next(label for label in labels if label.text == name))
        self.settle()

    def look_at(self, box: WebElement) -> None:
        """Scrolls there, again where the page moved meanwhile, and waits until it is drawn."""
        script = """
            const [box] = arguments;
            box.scrollIntoView({behavior: "instant"});
            return near.has(box) && !stale.has(box);
        """
        WebDriverWait(self.browser, 10).until(lambda _: self.run(script, box))

    def shown(self, key: str) -> str:
        return self.run("return document.querySelector(`[data-key='${arguments[0]}']`).textContent", key)

    def pair(self, table: str, a: str, b: str) -> pd.DataFrame:
        rows = self.tables[table]
        return rows[((rows["run_a"] == a) & (rows["run_b"] == b)) | ((rows["run_a"] == b) & (rows["run_b"] == a))]

    def expect(self, a: str, b: str, layer: int, projection: str) -> None:
        """The numbers shown are those of the tables."""
        here = f"model.layers.{layer}.self_attn.{projection}_proj"
        module = self.pair("modules", a, b).set_index("module").loc[here]
        of_layer = self.pair("layers", a, b).set_index("layer").loc[layer]
        whole = self.pair("pairs", a, b).iloc[0]
        wanted = {
            f"{m.name}-{where}": fixed(row[m.name], m.digits + 1) + "°" * (m.unit == "°")
            for m in weight_measures()
            for where, row in (("module", module), ("layer", of_layer), ("whole", whole))
            if m.name in row and not (m.name.startswith("gradient_") and pd.isna(row[m.name]))
        }
        assert wanted["angle_max_left-module"] == f"{fixed(module['angles_left'][-1], 2)}°"
        for which, run in (("a", a), ("b", b)):
            rows = self.tables["run_modules"]
            row = rows[(rows["run"] == run) & (rows["module"] == here)].iloc[0]
            wanted[f"norm-{which}-module"] = format(row["norm"], ".4g")
        assert {key: self.shown(key) for key in wanted} == wanted
        tiles = self.browser.find_element(By.ID, "x-status").text
        assert wanted["cosine-module"] in tiles
        assert f"layer {layer}, {projection}" in tiles
        states = self.pair("cka", a, b).set_index("layer")["cka_unbiased"]
        assert (f"CKA after layer {layer}" in tiles) == (len(states) > 0)
        if len(states):
            assert fixed(states[layer], 5) in tiles
            assert self.shown("barrier_chord-whole") == fixed(whole["barrier_chord"], 5)
        sign = 1 if whole["run_a"] == a else -1
        assert self.shown("accuracy_diff") == f"{fixed(100 * sign * round(whole['accuracy_diff'], 4), 2)} points"

    def messages(self) -> list[str]:
        return [entry["message"] for entry in self.browser.get_log("browser")]


def fixed(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


@pytest.fixture
def report(browser: webdriver.Chrome, analysis: Path) -> Iterator[Report]:
    browser.get_log("browser")
    found = Report(browser, analysis)
    yield found
    assert found.messages() == []


def test_it_opens_from_the_disk_and_loads_nothing(report: Report, analysis: Path, tmp_path: Path) -> None:
    requests = [json.loads(entry["message"])["message"] for entry in report.browser.get_log("performance")]
    page = (analysis / "report.html").as_uri()
    sent = [r["params"] for r in requests if r["method"] == "Network.requestWillBeSent"]
    urls = {each["request"]["url"] for each in sent if each["documentURL"] == page}
    assert page in urls
    assert {url.partition(":")[0] for url in urls} <= {"file", "data", "blob"}
    report.browser.save_screenshot(str(tmp_path / "report.png"))
    print(f"{report.ready:.0f} ms until the explorer stood on the screen: {tmp_path / 'report.png'}")


def test_another_pair_another_layer_other_numbers(report: Report) -> None:
    report.single_runs()
    for a, b, layer, projection in (
        ("sft-0.001-s0", "dpo-0.001-s0", 0, "q"),
        ("dpo-0.001-s1", "sft-0.001-s1", 4, "v"),  # the other way round
        ("rft-0.001-s0", "dpo-0.001-s1", 3, "o"),  # without connectivity and CKA
        ("rft-0.001-s0", f"{EVIL}-0.001-s1", 1, "k"),
    ):
        report.choose("a", a)
        report.choose("b", b)
        report.layer(layer)
        report.projection(projection)
        report.expect(a, b, layer, projection)


def test_a_run_is_not_compared_with_itself(report: Report) -> None:
    report.single_runs()
    report.choose("a", "sft-0.001-s0")
    options = Select(report.browser.find_element(By.ID, "x-b")).options
    assert [o.get_attribute("title") for o in options if not o.is_enabled()] == ["sft-0.001-s0"]
    report.choose("b", "dpo-0.001-s0")
    report.run("document.getElementById('x-swap').click()")
    report.settle()
    report.expect("dpo-0.001-s0", "sft-0.001-s0", 2, "q")


def test_methods_are_averaged_over_runs_of_different_seeds(report: Report) -> None:
    assert report.browser.find_element(By.CSS_SELECTOR, "#x-kind input:checked").get_attribute("value") == "arms"
    status = report.run("return document.getElementById('x-status').textContent")
    assert "● SFT 1e-3 and ◇ DPO 1e-3, mean ± standard deviation of 2 pairs" in status
    assert "of different seeds, from the same initial adapter" in status
    modules = [report.pair("modules", f"sft-0.001-s{seed}", f"dpo-0.001-s{1 - seed}") for seed in (0, 1)]
    found = [rows.set_index("module").loc["model.layers.2.self_attn.q_proj", "cosine"] for rows in modules]
    mean, std = (float(text.replace("−", "-")) for text in report.shown("cosine-module").split(" ± "))
    assert mean == pytest.approx(np.mean(found), abs=6e-4)
    assert std == pytest.approx(np.std(found, ddof=1), abs=6e-4)
    # The accuracies are those of the two losses, with the one verdict that there is.
    table = report.tables["arm_pairs"].set_index(["arm_a", "arm_b"])
    row = table.loc[("sft-0.001", "dpo-0.001")]
    better = {"better": "● better", "worse": "◇ better"}[row["accuracy_verdict"]]
    cell = report.run("return document.querySelector('[data-key=accuracy_diff]').parentElement.textContent")
    assert cell == f"{fixed(100 * row['accuracy_diff'], 2)} points95% {fixed(100 * row['diff_low'], 1)} … " + (
        f"{fixed(100 * row['diff_high'], 1)}\np (Holm) 0.04\n{better}"
    )
    whole = report.run("return document.querySelector('[data-key=cosine-whole]').parentElement.textContent")
    assert whole.endswith(row["cosine_verdict"])
    # An arm and itself: its own two runs.
    Select(report.browser.find_element(By.ID, "x-b")).select_by_value("0")
    report.settle()
    own = report.pair("pairs", "sft-0.001-s0", "sft-0.001-s1").iloc[0]
    assert report.shown("cosine-whole") == fixed(own["cosine"], 4)


def test_with_the_keyboard_alone(report: Report) -> None:
    def focus(wanted: str) -> None:
        for _ in range(60):
            if report.run("return document.activeElement.id || document.activeElement.name") == wanted:
                return
            press(Keys.TAB)
        raise AssertionError(f"{wanted} has no place in the order of the focus")

    def press(*keys: str) -> None:
        for key in keys:
            webdriver.ActionChains(report.browser).send_keys(key).perform()
        report.settle()

    focus("x-kind")
    press(Keys.ARROW_RIGHT)
    focus("x-a")
    press(Keys.HOME)
    focus("x-b")
    press(Keys.HOME, Keys.ARROW_DOWN)
    focus("x-layer")
    press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    focus("x-projection")
    press(Keys.ARROW_RIGHT)
    report.expect("sft-0.001-s0", "rft-0.001-s0", 4, "k")
    assert report.run("return document.getElementById('x-layer').getAttribute('aria-valuetext')") == "layer 4"


def test_every_chart_says_what_it_shows(report: Report) -> None:
    report.single_runs()
    report.choose("a", "sft-0.001-s0")
    report.choose("b", "dpo-0.001-s0")
    figures = report.browser.find_elements(By.CSS_SELECTOR, "#explore figure")
    assert len(figures) == 9
    for figure in figures:
        report.run("arguments[0].querySelector('details').open = true", figure)
        report.look_at(figure.find_element(By.CLASS_NAME, "plot"))
        report.settle()
        assert figure.find_elements(By.CLASS_NAME, "main-svg")
        assert len(figure.find_element(By.TAG_NAME, "figcaption").text) > 20
        assert figure.find_elements(By.CSS_SELECTOR, "tbody td"), figure.get_attribute("id")
    report.layer(3)
    for name in ("angles", "spectra"):
        report.look_at(report.browser.find_element(By.CSS_SELECTOR, f"#x-{name} .plot"))
    angles = report.run(
        "return [...document.querySelectorAll('#x-angles tbody tr')].map(row => row.cells[1].textContent)"
    )
    modules = report.pair("modules", "sft-0.001-s0", "dpo-0.001-s0").set_index("module")
    assert angles == [fixed(value, 2) for value in modules.loc["model.layers.3.self_attn.q_proj", "angles_left"]]
    sigmas = report.run(
        "return [...document.querySelectorAll('#x-spectra tbody tr')].map(row => Number(row.cells[1].textContent))"
    )
    link = report.run("return document.querySelector('#x-modules .download a').href")
    table = pd.read_csv(io.StringIO(unquote(link.partition(",")[2])), index_col="layer")
    for layer, projection in ((0, "q"), (4, "o")):
        cosine = modules.loc[f"model.layers.{layer}.self_attn.{projection}_proj", "cosine"]
        assert table.loc[layer, projection] == round(cosine, 4)
    rows = report.tables["run_modules"]
    row = rows[(rows["run"] == "sft-0.001-s0") & (rows["module"] == "model.layers.3.self_attn.q_proj")].iloc[0]
    assert sigmas == [float(f"{value:.4g}") for value in row["singular_values"]]


def test_a_module_is_chosen_by_a_click(report: Report) -> None:
    report.single_runs()
    report.choose("a", "sft-0.001-s0")
    report.choose("b", "dpo-0.001-s0")
    report.run("document.querySelector('#x-modules .plot').emit('plotly_click', {points: [{x: 1, y: 3}]})")
    report.settle()
    report.expect("sft-0.001-s0", "dpo-0.001-s0", 1, "o")


def test_a_link_and_a_reload_show_what_was_chosen(report: Report, analysis: Path) -> None:
    report.single_runs()
    report.choose("a", f"{EVIL}-0.001-s1")
    report.choose("b", "rft-0.001-s0")
    report.layer(4)
    report.projection("v")
    Select(report.browser.find_element(By.ID, "x-measure")).select_by_value("angle_min_left")
    WebDriverWait(report.browser, 5).until(lambda _: "measure=angle_min_left" in report.browser.current_url)
    link = report.browser.current_url
    page = (analysis / "report.html").as_uri()
    assert link.startswith(f"{page}#explore?")
    report.browser.get("about:blank")  # else nothing would be loaded
    for again in (False, True):
        report.browser.refresh() if again else report.browser.get(link)
        WebDriverWait(report.browser, 30).until(lambda _: report.ready)
        report.settle()
        report.expect(f"{EVIL}-0.001-s1", "rft-0.001-s0", 4, "v")
        assert report.browser.find_element(By.ID, "x-measure").get_attribute("value") == "angle_min_left"
        assert report.browser.find_element(By.CSS_SELECTOR, "#x-kind input:checked").get_attribute("value") == "runs"
        if not again:  # of a reload the browser says where
            assert report.run("return document.querySelector('#explore').getBoundingClientRect().top") < 100
    # What is not in this analysis, or no pair, is passed over; a link into the open page is followed.
    for wrong in ("of=runs&first=nobody&second=rft-0.001-s0", "of=runs&first=rft-0.001-s0&second=rft-0.001-s0", "of=x"):
        report.run("location.hash = arguments[0]", f"#explore?{wrong}&layer=99&measure=__proto__&projection=o")
        report.settle()
        report.expect(f"{EVIL}-0.001-s1", "rft-0.001-s0", 4, "o")
    report.run("location.hash = arguments[0]", "#explore?of=arms&first=SFT+1e-3&second=DPO+1e-3&layer=1")
    report.settle()
    assert "SFT 1e-3 and ◇ DPO 1e-3" in report.browser.find_element(By.ID, "x-status").text
    report.browser.get(page)


def test_a_name_with_markup_does_nothing(report: Report) -> None:
    report.single_runs()
    report.choose("b", f"{EVIL}-0.001-s0")
    for box in report.browser.find_elements(By.CSS_SELECTOR, ".plot"):
        report.look_at(box)
    assert EVIL in report.browser.find_element(By.CSS_SELECTOR, "#x-status p").text
    assert not report.run("return document.querySelectorAll('img, image[href^=\"x\"], [onerror]').length")
    assert report.browser.title == "LossLens: made"


def test_an_analysis_of_weights_alone(browser: webdriver.Chrome, tmp_path: Path) -> None:
    make_analysis(tmp_path, methods=["sft", "dpo"], layers=2, top=3, rank=4)
    for name in ("cka.csv", "connectivity.csv", "mds.csv", "training.csv", "layers.csv", "arm_pairs.csv"):
        (tmp_path / name).unlink()
    names = ("run_a", "run_b", "cosine", "angle_min_left")
    pd.read_csv(tmp_path / "pairs.csv")[list(names)].to_csv(tmp_path / "pairs.csv", index=False)
    write_report(tmp_path)
    browser.get_log("browser")
    browser.get((tmp_path / "report.html").as_uri())
    WebDriverWait(browser, 30).until(
        lambda _: browser.execute_script("return performance.getEntriesByName('explorer')[0]")
    )
    figures = browser.find_elements(By.CSS_SELECTOR, "#explore figure:not([hidden])")
    assert [figure.get_attribute("id") for figure in figures] == [
        "x-modules", "x-depth", "x-angles", "x-spectra", "x-norms"
    ]  # fmt: skip
    pair = pd.read_csv(tmp_path / "pairs.csv").iloc[0]
    assert fixed(pair["cosine"], 4) in browser.find_element(By.ID, "x-status").text
    assert browser.get_log("browser") == []


def test_a_phone(report: Report, tmp_path: Path) -> None:
    command = report.browser.execute_cdp_cmd
    command("Emulation.setDeviceMetricsOverride", {"width": 400, "height": 850, "deviceScaleFactor": 1, "mobile": True})
    try:
        report.run("document.querySelectorAll('details').forEach(each => each.open = true)")
        for box in report.browser.find_elements(By.CSS_SELECTOR, ".plot"):
            report.look_at(box)
        assert report.run("return document.documentElement.scrollWidth") == 400
        assert report.run(
            "return [...document.querySelectorAll('.plot')].every(box => box.getBoundingClientRect().right <= 400)"
        )
        report.browser.save_screenshot(str(tmp_path / "phone.png"))
    finally:
        command("Emulation.clearDeviceMetricsOverride", {})


def test_the_accuracy_halfway_stands_beside_that_of_the_ends_on_the_same_problems(report: Report) -> None:
    report.single_runs()
    report.choose("a", "sft-0.001-s0")
    report.choose("b", "dpo-0.001-s0")
    for a, b in (("sft-0.001-s0", "dpo-0.001-s0"), ("dpo-0.001-s0", "sft-0.001-s0")):
        whole = report.pair("pairs", a, b).iloc[0]
        ends = [whole["accuracy_mid_a"], whole["accuracy_mid_b"]][:: 1 if whole["run_a"] == a else -1]
        cell = report.run("return document.querySelector(`[data-key='accuracy_mid']`).closest('td').innerText")
        shown = [f"{100 * round(value, 4):.1f}%" for value in (whole["accuracy_mid"], *ends)]
        assert cell.split("\n") == [shown[0], f"● {shown[1]}, ◇ {shown[2]} on the same 100 problems"]
        report.run("document.getElementById('x-swap').click()")
        report.settle()


def test_no_plot_is_wider_than_its_column_on_paper(report: Report) -> None:
    """Printing begins with the plots as wide as on the screen, where there is more room."""
    command = report.browser.execute_cdp_cmd
    for box in report.browser.find_elements(By.CSS_SELECTOR, ".plot"):
        report.look_at(box)
    page = {"width": 703, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    report.run("dispatchEvent(new Event('beforeprint'))")
    command("Emulation.setEmulatedMedia", {"media": "print"})
    command("Emulation.setDeviceMetricsOverride", page)
    try:
        too_wide = """return [...document.querySelectorAll(".plot .main-svg")].filter(svg =>
            svg.getBoundingClientRect().right > svg.closest("figure").getBoundingClientRect().right + 1).length"""
        assert report.run(too_wide) == 0
    finally:
        command("Emulation.clearDeviceMetricsOverride", {})
        command("Emulation.setEmulatedMedia", {"media": ""})
        report.run("dispatchEvent(new Event('afterprint'))")


def test_in_the_dark_and_on_paper(report: Report) -> None:
    def ink() -> str:
        report.settle()
        return report.run("return getComputedStyle(document.querySelector('#x-modules .xtick text')).fill")

    light = ink()
    command = report.browser.execute_cdp_cmd
    command("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]})
    try:
        assert ink() != light
        printed = command("Page.printToPDF", {"printBackground": True, "preferCSSPageSize": True})["data"]
        assert base64.b64decode(printed).startswith(b"%PDF")
    finally:
        command("Emulation.setEmulatedMedia", {"features": []})
    assert ink() == light


OVERLAPS = Path(__file__).with_name("overlaps.js").read_text(encoding="utf-8")
# Pixels of an upright A4 page between its margins.
PAGE_WIDE, PAGE_HIGH = 703, 1032


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty losses, with names as long as one may be."""
    folder = tmp_path_factory.mktemp("many")
    own = [f"a_name_of_sixty_letters_for_a_method_that_somebody_wrote_own{number}" for number in range(3)]
    settings = [f"method.a_setting_that_has_a_long_name={number}" for number in range(4)]
    make_analysis(
        folder, ["sft", "grpo", *own], settings=settings, layers=2, projections=["q", "v"], top=3, rank=4, steps=5
    )
    write_report(folder)
    return folder


@contextmanager
def screen(browser: webdriver.Chrome, width: int, paper: bool = False) -> Iterator[None]:
    """A screen of a width, or a page of paper, with every plot drawn on it."""
    command = browser.execute_cdp_cmd
    size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 500}
    command("Emulation.setDeviceMetricsOverride", size)
    command("Emulation.setEmulatedMedia", {"media": "print" if paper else ""})
    try:
        if paper:
            browser.execute_script("dispatchEvent(new Event('beforeprint'))")
        else:
            browser.execute_script("for (const box of charts.keys()) paint(box)")
        browser.execute_async_script("const done = arguments[0]; setTimeout(done, 300)")
        yield
    finally:
        if paper:
            browser.execute_script("dispatchEvent(new Event('afterprint'))")
        command("Emulation.setEmulatedMedia", {"media": ""})
        command("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize(("width", "paper"), [(1280, False), (400, False), (PAGE_WIDE, True)])
def test_no_label_lies_on_another(browser: webdriver.Chrome, many: Path, width: int, paper: bool) -> None:
    if browser.current_url.partition("#")[0] != (many / "report.html").as_uri():
        browser.get((many / "report.html").as_uri())
        WebDriverWait(browser, 30).until(
            lambda _: browser.execute_script("return performance.getEntriesByName('explorer')[0]")
        )
    with screen(browser, width, paper):
        drawn = "return [...charts.keys()].filter(box => box.querySelector('.main-svg')).length"
        assert browser.execute_script(drawn) > 15
        assert browser.execute_script(OVERLAPS) == []
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        cells = """return [...document.querySelectorAll(".matrix td, .matrix th")]
            .filter(each => each.scrollWidth > each.clientWidth + 1).length"""
        assert browser.execute_script(cells) == 0
        if paper:  # the whole matrix between the margins, and each plot on one page
            right = "return document.querySelector('.matrix table').getBoundingClientRect().right"
            assert browser.execute_script(right) <= PAGE_WIDE
            highest = """return Math.max(...[...document.querySelectorAll("figure:not(:has(.matrix))")]
                .map(each => each.offsetHeight))"""
            assert browser.execute_script(highest) < PAGE_HIGH


def test_the_whole_matrix_of_twenty_losses_is_on_the_screen(browser: webdriver.Chrome, tmp_path: Path) -> None:
    make_analysis(tmp_path, list(builtin_losses()), layers=1, projections=["q"], top=3, rank=4, steps=2)
    browser.get(write_report(tmp_path).as_uri())
    with screen(browser, 1280):
        sizes = "const box = document.querySelector('.matrix'); return [box.scrollWidth, box.clientWidth]"
        needed, given = browser.execute_script(sizes)
        assert needed <= given


def test_pages_are_full(report: Report) -> None:
    """What is not broken over pages is at most two fifths of one, so none can be emptier but the last."""
    blocks = """
        const top = element => element.getBoundingClientRect().top;
        const bottom = element => element.getBoundingClientRect().bottom;
        const high = [...document.querySelectorAll("figure, tr")].map(each => each.offsetHeight);
        for (const section of document.querySelectorAll("section")) {  // a heading stays with what it is above
            const first = section.querySelector("figure:not([hidden])");
            const kept = first && section.id !== "glance" && section.id !== "explore";
            if (kept) high.push(bottom(first) - top(section.querySelector("h2")));
        }
        return Math.max(...high);
    """
    with screen(report.browser, PAGE_WIDE, paper=True):
        assert report.run(blocks) < 0.4 * PAGE_HIGH


def test_single_runs_open_with_a_pair_of_like_seeds(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """Also where more was measured of others."""
    make_analysis(tmp_path, ["rft", "sft", "dpo"], seeds=2, layers=2, top=3, rank=4)
    pairs = pd.read_csv(tmp_path / "pairs.csv")
    like = [a.rpartition("-s")[2] == b.rpartition("-s")[2] for a, b in zip(pairs["run_a"], pairs["run_b"], strict=True)]
    pairs["barrier_chord"], pairs["cka_last"] = (np.where(like, np.nan, 0.5) for _ in range(2))
    pairs.to_csv(tmp_path / "pairs.csv", index=False)
    write_report(tmp_path)
    found = Report(browser, tmp_path)
    found.single_runs()
    shown = [
        found.run("return document.getElementById(arguments[0]).selectedOptions[0].title", f"x-{which}")
        for which in "ab"
    ]
    assert shown == ["sft-0.001-s0", "dpo-0.001-s0"]


def test_colours_mean_the_same_whatever_is_chosen(report: Report) -> None:
    def scale() -> list[float]:
        report.settle()
        return report.run(
            "const {zmin, zmax} = document.querySelector('#x-modules .plot').data[0]; return [zmin, zmax]"
        )

    report.single_runs()
    scales: dict[str, set[tuple[float, ...]]] = {}
    measures = ("cosine", "angle_min_left", "angle_max_right", "u1", "orthogonal_share")
    for a, b in (("sft-0.001-s0", "dpo-0.001-s0"), ("rft-0.001-s0", "dpo-0.001-s1"), ("sft-0.001-s0", "sft-0.001-s1")):
        report.choose("a", a)
        report.choose("b", b)
        for name in measures:
            Select(report.browser.find_element(By.ID, "x-measure")).select_by_value(name)
            scales.setdefault(name, set()).add(tuple(scale()))
    most = round(max(report.tables["modules"]["u1"]), 4)
    assert {name: scales[name] for name in measures[:4]} == {
        "cosine": {(-1, 1)}, "angle_min_left": {(0, 90)}, "angle_max_right": {(0, 90)}, "u1": {(0, most)},
    }  # fmt: skip
    assert len(scales["orthogonal_share"]) == 1
    Select(report.browser.find_element(By.ID, "x-measure")).select_by_value("u1")
    report.settle()
    caption = report.browser.find_element(By.CSS_SELECTOR, "#x-modules figcaption").text
    assert f"The colour scale is 0 to {fixed(most, 4)}, the largest value of any pair." in caption
    Select(report.browser.find_element(By.ID, "x-measure")).select_by_value("cosine")


def test_a_loss_is_hidden_in_every_plot(report: Report) -> None:
    hidden = """return [...document.querySelectorAll("#geometry .plot, #training .plot")].flatMap(box => box.data ?? [])
        .filter(trace => trace.visible === false).map(trace => trace.meta)"""
    for box in report.browser.find_elements(By.CSS_SELECTOR, "#geometry .plot"):
        report.look_at(box)
    button = report.browser.find_element(By.CSS_SELECTOR, "#geometry button[data-loss='dpo-0.001']")
    assert "pairs of a correct and an incorrect rollout" in (button.get_attribute("title") or "")
    report.run("arguments[0].click()", button)
    report.settle()
    assert set(report.run(hidden)) == {"dpo-0.001"}
    report.run("arguments[0].click()", button)
    report.settle()
    assert report.run(hidden) == []
