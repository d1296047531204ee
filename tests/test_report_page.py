"""The report in a real browser, opened from the disk."""

import csv

import pyarrow as pa
import pytest
import torch

from lightning_mimic.curation import Manifest, curate, report
from lightning_mimic.data import WithIds
from lightning_mimic.manifest import write_manifest
from support.browser import started_browser
from support.ledgers import write_ledger

pytestmark = pytest.mark.slow

EVIL = "<script>window.hacked = 1</script>"
NAMES = ["cat", EVIL, '<img src=x onerror="window.hacked = 2">']


def manifest_of(folder, ids, labels, predicted, scores, posteriors=None, names=NAMES, **more):
    keep = [score >= 0 for score in scores] if posteriors is None else [each >= 0.5 for each in posteriors]
    columns = {"id": ids, "keep": keep, "score": scores, "reason": [None if k else "mean score below 0" for k in keep]}
    columns |= {"label": pa.array(labels, pa.int64()), "predicted": pa.array(predicted, pa.int64())}
    if posteriors is not None:
        columns["posterior"] = posteriors
    provenance = {"filter": "Sign()" if posteriors is None else "Posterior()", "class_names": names} | more
    folder.mkdir(parents=True, exist_ok=True)
    return write_manifest(folder / "manifest.parquet", pa.table(columns).to_reader(), provenance)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with started_browser(tmp_path_factory.mktemp("downloads")) as started:
        yield started


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """300 images with ids, labels and captions that would do harm if they were not escaped."""
    folder = tmp_path_factory.mktemp("report")
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(300, 3, 60, 60, generator=draw)
    labels = (torch.arange(300) % 3).tolist()
    predicted = [(label + (row % 5 == 0)) % 3 for row, label in enumerate(labels)]
    posteriors = [0.01 + 0.001 * row if row % 5 == 0 else 0.6 + 0.001 * row for row in range(300)]
    ids = [f"{EVIL}/{row}" if row else "=1+1" for row in range(300)]
    samples = [(image, f"{EVIL} caption {row}") for row, image in enumerate(images)]
    wrong = {"estimate": 0.2, "low": 0.15, "high": 0.25, "samples": 300}
    scores = [value - 0.3 for value in posteriors]
    facts = {"verdict": "doubtful", "diagnosis": f"The reference is doubtful: {EVIL}", "wrong_share": wrong}
    facts["ledger"] = {"directory": "/home/somebody/secret/scores", "run": "abc", "config": {"scorer": "MimicScore"}}
    manifest_of(folder / "curated", ids, labels, predicted, scores, posteriors, **facts)
    return report(folder / "curated", WithIds(samples, ids), folder / "page")


def test_it_opens_from_the_disk_and_asks_for_nothing_else(browser, page):
    browser.open(page)
    browser.wait(lambda: browser.run("return [...document.images].every(i => i.complete && i.naturalWidth > 0)"))
    messages, asked = browser.logs()
    assert messages == []
    assert {address.partition(":")[0] for address in asked} <= {"file", "data"}
    assert [address for address in asked if address.startswith("file")] == [page.resolve().as_uri()]


def test_nothing_in_it_runs_or_names_a_path(browser, page):
    browser.open(page)
    browser.click(".card")
    assert browser.run("return window.hacked === undefined")
    assert browser.text("#detail-title") == "Sample =1+1"
    assert EVIL in browser.text("#detail-body")
    browser.press("\ue00c")  # Escape
    assert "secret" not in page.read_text()
    assert page.read_text().count("</script>") == 2


def test_counts_are_those_of_the_manifest(browser, page):
    rows = Manifest(page.parent.parent / "curated" / "manifest.parquet").table().to_pylist()
    browser.open(page)
    assert "Of 300 samples, 240 are kept and 60 (20.0%) are dropped." in browser.text(".lead")
    assert sum(row["keep"] for row in rows) == 240
    figures = dict(zip(browser.texts(".figures dt"), browser.texts(".figures strong"), strict=True))
    assert figures["Labels that are probably wrong"] == "20.0%"
    assert figures["Reference"] == "doubtful"
    assert browser.text(".warning").startswith("Note. The reference is doubtful")
    cells = browser.run(
        "return [...document.querySelectorAll('.matrix td button')]"
        ".map(b => [+b.dataset.given, +b.dataset.predicted, +b.innerText])"
    )
    expected = {}
    for row in rows:
        pair = row["label"], row["predicted"]
        expected[pair] = expected.get(pair, 0) + 1
    assert {(given, predicted): count for given, predicted, count in cells} == expected
    of_classes = browser.texts(".list tbody tr")
    assert [line.split("\t")[0] for line in of_classes] == ["cat", EVIL, NAMES[2]]  # as many are dropped of each
    assert all("20 (20.0%)" in line for line in of_classes)


def test_a_click_in_the_matrix_filters_the_gallery(browser, page):
    browser.open(page)
    browser.click(".matrix button[data-given='0'][data-predicted='1']")
    assert browser.text("#count") == "20 samples of the 300 in this page"
    assert {line for card in browser.texts(".card") for line in card.splitlines() if line.startswith("given")} == {
        "given cat"
    }
    browser.click("#filters [type=reset]")
    browser.wait(lambda: browser.text("#count") == "300 samples")
    browser.click("button.link[data-given='2']")
    assert browser.text("#count") == "100 samples of the 300 in this page"


def test_search_tabs_sort_and_pages(browser, page):
    browser.open(page)
    first = browser.texts(".card .facts")[0]
    assert first.startswith("id =1+1")
    browser.set("#search", "caption 29")
    assert browser.text("#count") == "11 samples of the 300 in this page"  # 29, and 290 to 299
    browser.set("#search", "")
    browser.set("#decision", "dropped")
    assert browser.text("#count") == "60 samples of the 300 in this page"
    browser.set("#decision", "")
    assert len(browser.texts(".card")) == 60
    browser.click("#next-page")
    assert browser.text("#page") == "Page 2 of 5"
    browser.click("[data-tab=best]")
    assert browser.texts(".card .facts")[0].startswith(f"id {EVIL}/299")
    browser.click("[data-tab=borderline]")
    near = [float(text.split("right: ")[1].split()[0]) for text in browser.texts(".card .facts")[:2]]
    assert near == sorted(near, key=lambda each: abs(each - 50))
    browser.set("#sort", "score")
    assert browser.texts(".card .facts")[0].startswith("id =1+1")


def test_corrections_are_made_by_keys_kept_downloaded_and_applied(browser, page, tmp_path):
    browser.open(page)
    browser.run("localStorage.clear()")
    browser.open(page)
    browser.click(".card")
    browser.press("k")
    assert "kept (by hand)" in browser.text("#detail-body")
    browser.press("\ue014")  # →
    assert browser.text("#detail-title") == f"Sample {EVIL}/5"
    browser.press("r")
    browser.press(NAMES[1], "\ue007")  # Enter
    browser.wait(lambda: "by hand" in browser.text("#detail-body"))
    browser.press("\ue014")
    browser.press("d")  # it is dropped already: no correction
    browser.press("\ue014", "k", "u")  # taken back
    browser.press("\ue00c")
    assert browser.text("#corrected-count") == "2"
    browser.open(page)  # they are kept
    assert browser.text("#corrected-count") == "2"
    browser.click("#download")
    file = browser.downloads / "corrections.csv"
    browser.wait(file.exists)
    with file.open(newline="") as text:
        rows = list(csv.reader(text))
    assert rows == [
        ["id", "keep", "label", "label_name"],
        ["'=1+1", "true", "", ""],
        [f"{EVIL}/5", "true", "1", EVIL],
    ]
    seen = Manifest(page.parent.parent / "curated" / "manifest.parquet").table()
    scored = {name: seen[name].to_pylist() for name in ("id", "score", "label")}
    write_ledger(tmp_path / "scores", scored, notes={"class_names": NAMES})
    corrected = curate(tmp_path / "scores", corrections=file).manifest.table().to_pylist()
    by_hand = {row["id"]: (row["keep"], row["corrected_label"]) for row in corrected if row["reason"] == "by hand"}
    assert by_hand == {"=1+1": (True, None), f"{EVIL}/5": (True, 1)}


def test_it_is_readable_in_the_dark_and_on_a_telephone(browser, page):
    browser.open(page)
    light = browser.run("return getComputedStyle(document.body).backgroundColor")
    browser.emulate("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    dark = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(20, 23, 27)")
    try:
        browser.emulate("Emulation.setDeviceMetricsOverride", width=375, height=800, deviceScaleFactor=1, mobile=True)
        assert browser.run("return document.documentElement.scrollWidth") <= 375
    finally:
        browser.emulate("Emulation.clearDeviceMetricsOverride")
        browser.emulate("Emulation.setEmulatedMedia", features=[])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("opened", [False, True], ids=["page", "sample"])
def test_a_screen_reader_finds_its_way(browser, page, scheme, opened):
    axe = pytest.importorskip("axe_core_python.selenium", reason="BROWSER TESTS NOT RUN: axe-core-python").Axe()
    browser.emulate("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.open(page)
    if opened:
        browser.click(".card")
    found = axe.run(browser.driver)
    browser.emulate("Emulation.setEmulatedMedia", features=[])
    serious = [each for each in found["violations"] if each["impact"] in ("serious", "critical")]
    assert [(each["id"], [node["html"] for node in each["nodes"]][:3]) for each in serious] == []


def test_a_hundred_thousand_samples_are_filtered_within_a_second(browser, tmp_path):
    count = 100_000
    scores = [(row - count / 2) / count for row in range(count)]
    labels = [row % 3 for row in range(count)]
    manifest_of(tmp_path / "curated", list(range(count)), labels, labels, scores, names=None)
    page = report(tmp_path / "curated", out=tmp_path / "page")
    assert page.stat().st_size < 25e6
    browser.open(page)
    assert browser.text("#count") == "100,000 samples"
    took = browser.run(
        "const start = performance.now(); const f = document.getElementById('search'); f.value = '9999';"
        "f.dispatchEvent(new Event('input', {bubbles: true})); document.body.offsetHeight;"
        "return performance.now() - start"
    )
    assert browser.text("#count") == "19 samples of the 100,000 in this page"  # 9999, 09999 to 99999, 99990 to 99998
    assert took < 1000
