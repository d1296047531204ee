"""The report without a browser: its figures against slow ones, its views of samples, its limits."""

import io
import json
import re
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from lightning_mimic import Ledger, WithIds
from lightning_mimic.curation import CurationError, curate, report
from lightning_mimic.data.image_text import ImageTextDataModule
from lightning_mimic.database import Database
from lightning_mimic.errors import MimicError
from lightning_mimic.manifest import write_manifest
from lightning_mimic.report import (
    ManifestFacts,
    default_render,
    fiftyone_samples,
    manifest_view,
    views,
    write_spotlight,
)
from support.cases import for_each
from support.ledgers import write_ledger
from support.pair_shards import pair, picture_of, tokenizer, transform, uid, write, write_shards


def manifest_of(folder, columns, **provenance):
    folder.mkdir(parents=True, exist_ok=True)
    return write_manifest(folder / "manifest.parquet", pa.table(columns).to_reader(), provenance)


def random_manifest(folder, count=500, seed=0, **more):
    draw = np.random.default_rng(seed)
    scores = [None if draw.random() < 0.05 else float(each) for each in draw.normal(size=count)]
    columns = {
        "id": draw.permutation(count).tolist(),
        "keep": [None if score is None else score >= 0.2 for score in scores],
        "score": pa.array(scores, pa.float64()),
        "reason": [None] * count,
        "label": draw.integers(0, 4, count).tolist(),
        "predicted": draw.integers(0, 4, count).tolist(),
    }
    return manifest_of(folder, columns, **({"filter": "TopK()"} | more)), columns


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)[1])


@for_each("seed", [0, 1, 2])
def test_its_figures_are_those_of_a_slow_count(tmp_path, seed):
    manifest, columns = random_manifest(tmp_path, seed=seed)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*map(list, columns.values()), strict=True)]
    rows = [{name: each.as_py() if hasattr(each, "as_py") else each for name, each in row.items()} for row in rows]
    with Database() as database:
        facts = ManifestFacts(manifest, database)
        assert (facts.samples, facts.kept) == (500, sum(row["keep"] is True for row in rows))
        assert facts.unscored == sum(row["score"] is None for row in rows)
        assert facts.cut == min(row["score"] for row in rows if row["keep"])
        assert facts.matrix() == dict(Counter((row["label"], row["predicted"]) for row in rows))
        for each in facts.classes():
            members = [row for row in rows if row["label"] == each.label]
            assert each.samples == len(members)
            assert each.dropped == sum(not row["keep"] for row in members)
            assert each.mean == pytest.approx(np.mean([row["score"] for row in members if row["score"] is not None]))
            others = Counter(row["predicted"] for row in members if row["predicted"] != each.label)
            assert each.others == max(others.values())
            assert others[each.other] == each.others
        bins = facts.histogram("score")
        for each in bins:
            inside = [row for row in rows if row["score"] is not None and each.low <= row["score"] < each.high]
            assert (each.kept, each.dropped) == (
                sum(row["keep"] for row in inside), sum(not row["keep"] for row in inside),
            )  # fmt: skip
        assert sum(each.kept + each.dropped for each in bins) == 500 - facts.unscored
        assert all(not (each.kept and each.dropped) for each in bins)  # the cut is the edge of a bin
        assert any(abs(each.low - facts.cut) < 1e-9 for each in bins)


def test_of_too_many_rows_the_worst_the_nearest_to_the_cut_and_the_best_are_shown(tmp_path):
    manifest, columns = random_manifest(tmp_path)
    scores = dict(zip(columns["id"], columns["score"].to_pylist(), strict=True))
    scored = sorted((each for each in scores if scores[each] is not None), key=scores.get)
    with Database() as database:
        facts = ManifestFacts(manifest, database)
        shown = facts.shown(40)
        nearest = sorted(scored, key=lambda each: abs(scores[each] - facts.cut))
        assert set(shown.ids) == {*scored[:20], *nearest[:10], *scored[-10:]}
        assert shown.ids == sorted(shown.ids, key=scores.get)
        assert [shown.ids[row] for row in shown.borderline][:10] == nearest[:10]
        whole = facts.shown(1000)
    assert whole.ids[: len(scored)] == scored
    assert len(whole) == 500


def test_posteriors_order_what_they_decide(tmp_path):
    columns = {"id": [0, 1, 2, 3], "keep": [False, True, True, False], "score": [9.0, -9.0, 0.0, 1.0]}
    columns["posterior"] = [0.1, 1.0, 0.5, 0.4999]
    with Database() as database:
        facts = ManifestFacts(manifest_of(tmp_path, columns, filter="Posterior()"), database)
        assert (facts.measure, facts.cut) == ("posterior", 0.5)
        assert facts.shown(10).ids == [0, 3, 2, 1]
        bins = facts.histogram("posterior")
        assert [(round(each.low, 4), each.kept, each.dropped) for each in bins if each.kept + each.dropped] == [
            (0.1, 0, 1), (0.4833, 0, 1), (0.5, 1, 0), (0.9833, 1, 0),
        ]  # fmt: skip


def test_a_manifest_of_decisions_alone_has_a_page(tmp_path):
    manifest_of(tmp_path / "m", {"id": ["b", "a"], "keep": [True, False], "reason": [None, "a duplicate"]})
    page = report(tmp_path / "m", out=tmp_path / "page")
    assert data_of(page)["ids"] == ["a", "b"]  # what is dropped comes first
    assert "Of 2 samples, 1 are kept and 1 (50.0%) are dropped." in page.read_text()


def test_an_empty_manifest_has_a_page(tmp_path):
    manifest_of(tmp_path / "m", {"id": pa.array([], pa.int64()), "keep": pa.array([], pa.bool_())})
    assert data_of(report(tmp_path / "m", [], tmp_path / "page"))["ids"] == []


def test_the_course_of_a_score_over_the_epochs(tmp_path):
    scores = {0: [1.0, 2.0, 3.0], 1: [-1.0, None, -3.0]}
    both = [scores[sample][epoch] for epoch in range(3) for sample in (0, 1)]
    rows = {"id": [0, 1] * 3, "epoch": [0, 0, 1, 1, 2, 2], "score": both}
    write_ledger(tmp_path / "scores", rows)
    curate(tmp_path / "scores", out=tmp_path / "curated")
    data = data_of(report(tmp_path / "curated", ["a", "b"], tmp_path / "page", ledger=tmp_path / "scores"))
    of = {data["ids"][int(row)]: course for row, course in data["courses"].items()}
    assert of == {"0": [[0, 1.0], [1, 2.0], [2, 3.0]], "1": [[0, -1.0], [2, -3.0]]}


def test_two_manifests_are_compared(tmp_path):
    one = manifest_of(tmp_path / "a", {"id": [0, 1, 2, 3, 4], "keep": [True, True, False, False, True]})
    other = manifest_of(tmp_path / "b", {"id": [0, 1, 2, 3, 3, 9], "keep": [True, False, True, False, False, True]})
    with Database() as database:
        found = ManifestFacts(one, database, other).agreement()
    assert (found.both, found.here, found.there, found.neither, found.unknown, found.missing) == (1, 1, 1, 1, 1, 1)
    page = report(one, out=tmp_path / "page", against=other, names=("old", "new"))
    data = data_of(page)
    assert dict(zip(data["ids"], data["columns"]["other_keep"], strict=True)) == {
        "0": True, "1": False, "2": True, "3": False, "4": None,
    }  # fmt: skip
    assert "Kept only by old" in page.read_text()
    words = manifest_of(tmp_path / "c", {"id": ["0", "1"], "keep": [True, True]})
    with pytest.raises(CurationError, match=r"has ids of type BIGINT, but .* of type VARCHAR"):
        report(one, out=tmp_path / "page", against=words)


def test_the_page_stays_within_its_size(tmp_path):
    draw = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 100, 100, generator=draw) for _ in range(60)]
    manifest_of(tmp_path / "m", {"id": list(range(60)), "keep": [True] * 60, "score": [float(k) for k in range(60)]})
    whole = report(tmp_path / "m", images, tmp_path / "whole")
    assert len(data_of(whole)["images"]) == 60
    size = whole.stat().st_size
    small = report(tmp_path / "m", images, tmp_path / "small", megabytes=size / 1.5 / 1e6)
    assert size / 2 < small.stat().st_size <= size / 1.5
    kept = len(data_of(small)["images"])
    assert 0 < kept < 60
    assert f"{60 - kept} images or texts are left out to limit the size" in small.read_text()
    few = report(tmp_path / "m", images, tmp_path / "few", most_views=8)
    assert sorted(map(int, data_of(few)["images"])) == [0, 1, 2, 3, 4, 5, 58, 59]


def test_samples_that_are_not_there_or_cannot_be_read_are_said_to_be(tmp_path):
    manifest_of(tmp_path / "m", {"id": [0, 1, 5], "keep": [True] * 3, "score": [0.0, 1.0, 2.0]})

    class Broken(list):
        def __getitem__(self, row):
            if row == 1:
                raise OSError("the file is gone")
            return super().__getitem__(row)

    page = report(tmp_path / "m", Broken(["a", "b"]), tmp_path / "page")
    assert data_of(page)["texts"] == {"0": "a", "1": "cannot be read: the file is gone"}
    assert "1 of these samples are not in the given data set." in page.read_text()
    with pytest.raises(MimicError, match="has none of the 3 samples to show, such as id 0"):
        report(tmp_path / "m", WithIds(["a", "b"], ["x", "y"]), tmp_path / "page")
    with pytest.raises(MimicError, match="`dataset` is a int; expected a map-style data set"):
        report(tmp_path / "m", 3, tmp_path / "page")


def test_images_and_captions_of_shards_are_found_by_id(tmp_path):
    shards = write_shards(tmp_path, 5, 3)
    broken = write(tmp_path / "broken.tar", pair(8, txt=b"  ") + pair(9))
    module = ImageTextDataModule([*map(str, shards), str(broken)], transform, tokenizer)
    module.setup("fit")
    wanted = [uid(6), uid(1), uid(8), uid(9), "unknown"]
    found = dict(module.samples_by_id(wanted))
    assert {name: caption for name, (_, caption) in found.items()} == {uid(n): f"number {n}" for n in (1, 6, 9)}
    assert all(image.getpixel((0, 0)) == picture_of(n).getpixel((0, 0)) for n in (1, 6) for image in [found[uid(n)][0]])
    manifest_of(tmp_path / "m", {"id": wanted, "keep": [True] * 5, "score": [0.0, 1.0, 2.0, 3.0, 4.0]})
    data = data_of(report(tmp_path / "m", module, tmp_path / "page"))
    assert data["texts"] == {"0": "number 6", "1": "number 1", "3": "number 9"}
    assert set(data["images"]) == {"0", "1", "3"}


IMAGE = Image.new("RGB", (2, 2), (255, 0, 0))


@for_each(
    ("sample", "size", "text"),
    [
        (IMAGE, (2, 2), None),
        ((IMAGE, "a red square"), (2, 2), "a red square"),
        ({"image": IMAGE, "caption": "red", "label": 1}, (2, 2), "red"),
        ((torch.zeros(1, 5, 4), torch.tensor(3)), (4, 5), None),
        ((torch.randn(3, 5, 4), 3), (4, 5), None),
        (np.zeros((6, 5, 3), np.uint8), (5, 6), None),
        (np.zeros((6, 5), np.uint8), (5, 6), None),
        (("a review", 1), None, "a review"),
        ({"input_ids": torch.tensor([5, 6, 7]), "label": 0}, None, "5, 6, 7"),
        ((torch.tensor([0.5, -1.25]), 1), None, "0.5, -1.25"),
        ((torch.arange(20.0), 1), None, "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, … (20 numbers)"),
        (([1, 2.5], 0), None, "1, 2.5"),
    ],
)
def test_a_sample_is_shown_by_what_it_is(sample, size, text):
    shown = default_render(sample)
    image, caption = shown if isinstance(shown, tuple) else (shown, None)
    if size is None:
        assert shown == text
        return
    (_, view), = views([sample], [0])  # fmt: skip
    assert view.image.startswith("data:image/png;base64,")
    assert caption == text
    assert (image.size if isinstance(image, Image.Image) else image.shape) == size


def test_normalised_images_are_stretched_and_others_are_not():
    dark, bright = (
        default_render(torch.full((1, 2, 2), 0.25)),
        default_render(torch.tensor([[[-2.0, 0.0], [1.0, 2.0]]])),
    )
    assert np.asarray(dark).tolist() == [[64, 64], [64, 64]]
    assert np.asarray(bright).tolist() == [[0, 128], [191, 255]]


def test_anything_else_needs_a_function_of_ones_own():
    with pytest.raises(MimicError, match=r"a sample is a object, which the report cannot show\. Give `render`"):
        list(views([object()], [0]))
    (_, view), = views([object()], [0], lambda sample: (IMAGE, "mine"))  # fmt: skip
    assert (view.image is not None, view.text) == (True, "mine")
    with pytest.raises(MimicError, match="`render` returned a int for sample 0"):
        list(views([object()], [0], lambda sample: 3))


def test_notebooks_show_figures_and_the_worst_samples(tmp_path):
    evil = "<script>alert(1)</script>"
    columns = {"id": [f"{evil}{k}" for k in range(20)], "keep": [k > 4 for k in range(20)]}
    columns |= {"score": [float(k) for k in range(20)], "label": [k % 2 for k in range(20)]}
    manifest = manifest_of(tmp_path, columns, class_names=["cat", evil])
    view = manifest_view(manifest, WithIds([(torch.rand(3, 9, 9), evil)] * 20, columns["id"]), most=3)
    assert view._repr_html_().count("data:image/png") == 3
    assert evil not in view._repr_html_()
    assert "Kept: 15 (75.0% of 20)" in repr(view)
    assert repr(view).splitlines()[-3:] == [
        f"id {evil}0, given cat, score 0, decision dropped",
        f"id {evil}1, given {evil}, score 1, decision dropped",
        f"id {evil}2, given cat, score 2, decision dropped",
    ]


def test_ledgers_and_curations_show_themselves_in_a_notebook(tmp_path):
    write_ledger(tmp_path / "<b>scores", {"id": [0, 1], "score": [1.0, -1.0]})
    shown = Ledger(tmp_path / "<b>scores")._repr_html_()
    assert "<th>ledger</th><td>&lt;b&gt;scores</td>" in shown
    assert "<th>parts</th><td>1</td>" in shown
    done = curate(tmp_path / "<b>scores")
    assert "50.0% of 2" in done._repr_html_()
    assert done.show(["a", "b"], samples=1)._repr_html_().count("<div>b</div>") == 1


def test_what_is_no_manifest_is_refused(tmp_path):
    with pytest.raises(CurationError, match="is no manifest"):
        report(tmp_path, out=tmp_path / "page")
    assert not (tmp_path / "page").exists()


@pytest.fixture
def photographed(tmp_path):
    columns = {"id": ["a", "b", "c"], "keep": [False, True, True], "score": [-1.0, 0.5, 1.0], "label": [0, 1, 1]}
    columns |= {"predicted": [1, 1, None], "reason": ["mean score below 0", None, None]}
    manifest = manifest_of(tmp_path / "m", columns, filter="Sign()", class_names=["cat", "dog"])
    return manifest, WithIds([(torch.rand(3, 60, 50), "a"), (torch.rand(3, 9, 9), "b"), "no image"], columns["id"])


def test_spotlight_shows_the_table_that_is_written_for_it(tmp_path, photographed):
    path = write_spotlight(*photographed, tmp_path / "table.parquet")
    rows = pq.read_table(path).to_pylist()
    assert [(row["id"], row["keep"], row["given_label"], row["predicted_label"], row["text"]) for row in rows] == [
        ("a", False, "cat", "dog", "a"), ("b", True, "dog", "dog", "b"), ("c", True, "dog", None, "no image"),
    ]  # fmt: skip
    sizes = [None if row["image"] is None else Image.open(io.BytesIO(row["image"])).size for row in rows]
    assert sizes == [(50, 60), (9, 9), None]
    with pytest.raises(CurationError, match="is there already"):
        write_spotlight(*photographed, path)
    spotlight = pytest.importorskip("renumics.spotlight", reason="VIEWER TEST NOT RUN: renumics-spotlight is missing")
    viewer = spotlight.show(path, dtype={"image": spotlight.Image}, no_browser=True, wait=False)
    try:
        assert viewer.df["id"].tolist() == ["a", "b", "c"]
    finally:
        viewer.close()


def test_fiftyone_takes_the_samples_that_are_made_for_it(tmp_path, photographed):
    pytest.importorskip("fiftyone", reason="VIEWER TEST NOT RUN: fiftyone is missing")
    first, second = fiftyone_samples(*photographed, tmp_path / "images")
    assert (first.tags, second.tags) == (["dropped"], ["kept"])
    assert (first.sample_id_in_run, first.score, first.given_label.label, first.predicted_label.label) == (
        "a", -1.0, "cat", "dog",
    )  # fmt: skip
    assert [Image.open(each.filepath).size for each in (first, second)] == [(50, 60), (9, 9)]


def test_without_fiftyone_it_is_said_how_to_get_it(tmp_path, photographed, monkeypatch):
    monkeypatch.setitem(sys.modules, "fiftyone", None)
    with pytest.raises(CurationError, match="pip install fiftyone"):
        fiftyone_samples(*photographed, tmp_path / "images")
