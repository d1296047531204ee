"""mimic-curate, mimic-select and mimic-compare: what they print, write and refuse, in a directory of their own."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_mimic.cli.curate import compare_main, curate_main, select_main
from lightning_mimic.curation import Manifest, curate, estimate_quality
from support.ledgers import note, write_ledger, write_scores

MAINS = {"mimic-curate": curate_main, "mimic-select": select_main, "mimic-compare": compare_main}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty directory to work in, and a terminal that is wide enough."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command in this process; gives what it printed."""

    def runs(command, *words):
        monkeypatch.setattr(sys, "argv", [command, *map(str, words)])
        MAINS[command]()
        return capsys.readouterr().out

    return runs


def refused(run, command, *words):
    """What a command says when it ends so; one line, no traceback."""
    with pytest.raises(SystemExit) as info:
        run(command, *words)
    assert info.value.code == 2, info.value
    return str(info.value)


def cells(text):
    """Rows of a table as lists of stripped cells."""
    lines = [line for line in text.splitlines() if line.startswith(("│", "┃"))]
    return [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines]


def scored(folder, *, ids=None):
    write_scores(folder, [3.0, 2.0, 1.0, -1.0, np.nan], ids=ids, label=1, predicted=2)
    return folder


def test_curate_prints_a_table_and_writes_into_out_alone(run, tmp_path, here):
    scored(tmp_path / "scores")
    pq.write_table(pa.table({"id": range(2000)}), tmp_path / "pool.parquet")
    text = run("mimic-curate", f"ledger={tmp_path}/scores", f"pool={tmp_path}/pool.parquet", "unscored=drop",
               "exports=[csv,cleanlab]")  # fmt: skip
    assert "by Sign()" in text
    assert cells(text) == [
        ["samples", "2,000", "in the pool, or else in the ledger"],
        ["kept", "3", "0.1%"],
        ["dropped", "1,997", "99.9%"],
        ["coverage", "0.2%", "1,996 without a score go"],
        ["by sign", "75.0%", "share kept by the sign of the mean score, whatever the filter"],
        ["mean score", "+2", "of what is kept; +1.25 of all"],
        ["quality", "–", "unknown without trusted samples"],
    ]
    names = ["label_issues.csv", "manifest.csv", "manifest.parquet"]
    assert text.splitlines()[-4:-1] == [f"  curated/{name}" for name in names]
    assert os.listdir(here) == ["curated"]
    assert sorted(os.listdir(here / "curated")) == names
    assert sum(Manifest("curated/manifest.parquet").table()["keep"].to_pylist()) == 3


def test_curate_shows_a_calibrated_quality_and_what_is_left_out(run, tmp_path):
    rows = {"id": [0, 1, 2, 3], "score": [1.0, 1.0, 1.0, -1.0], "part": [0, 0, 1, 1]}
    write_ledger(tmp_path / "scores", rows)
    write_scores(tmp_path / "right", [1.0] * 20)
    write_scores(tmp_path / "wrong", [-1.0] * 20)
    next((tmp_path / "scores").glob("*-000000-n2.parquet")).unlink()
    text = run("mimic-curate", f"ledger={tmp_path}/scores", f"trusted={tmp_path}/right", "allow_partial=true",
               f"mislabelled=[{tmp_path}/wrong,{tmp_path}/wrong]", "out=a/b")  # fmt: skip
    found = estimate_quality(1, 2, [True] * 20, [False] * 20)
    assert cells(text)[3:] == [
        ["coverage", "100.0%", "every sample has a score"],
        ["by sign", "50.0%", "share kept by the sign of the mean score, whatever the filter"],
        ["mean score", "+1", "of what is kept; +0 of all"],
        ["quality", "50.0%", f"95 % interval {found.low:.1%} to {found.high:.1%}, by 20 trusted samples"],
        ["left out", "1", "damaged, missing or in doubt: attempt 0, rank 0, part 0 (missing)"],
    ]
    assert text.splitlines()[-2] == "  a/b/manifest.parquet"


DOUBTFUL = {"verdict": "doubtful", "findings": ["its weights have [little] in common"]}
SHARE = {"wrong_share": 0.25, "low": 0.125, "high": 0.375, "samples": 900, "biases": None}


def test_curate_begins_with_the_verdict_and_shows_the_share_of_wrong_labels(run, tmp_path):
    ledger = f"ledger={scored(tmp_path / 'scores')}"
    assert run("mimic-curate", ledger, "unscored=drop", "out=a").startswith("The reference was not diagnosed.\n")
    note(tmp_path / "scores", 0, {"diagnosis": DOUBTFUL, "calibration": SHARE})
    said = refused(run, "mimic-curate", ledger, "unscored=drop")
    assert said.startswith(f"mimic-curate: {tmp_path}/scores: the reference is doubtful: its weights have [little] in")
    assert said.endswith("`accept_verdict=true` decides anyway.")
    text = run("mimic-curate", ledger, "unscored=drop", "accept_verdict=true")
    first = "The reference is doubtful: its weights have [little] in common; decided anyway."
    assert text.splitlines()[0] == first
    estimate = "95 % interval 12.5% to 37.5%, as the calibrated reference estimates"
    assert cells(text)[-1] == ["wrong labels", "25.0%", estimate]
    note(tmp_path / "scores", 0, {"diagnosis": {"verdict": "unrelated"}})
    said = refused(run, "mimic-curate", ledger, "unscored=drop", "accept_verdict=true", "out=b")
    assert said.startswith(f"mimic-curate: {tmp_path}/scores: the reference is unrelated. Its scores may")


def test_curate_says_where_the_sign_means_nothing_and_what_the_quality_rests_on(run, tmp_path):
    config = {"scorer": "ReferenceLoss"}
    for name, labels in (("data", 0), ("right", 0), ("wrong", 1)):
        rows = {"id": range(20), "score": -1.0, "label": labels, "reference_predicted": 0, "posterior": 0.75}
        write_ledger(tmp_path / name, rows, configs=config)
    words = ["filter=posterior", f"trusted={tmp_path}/right", f"mislabelled={tmp_path}/wrong"]
    rows = cells(run("mimic-curate", f"ledger={tmp_path}/data", *words))
    assert rows[4] == ["by sign", "–", "0 does not divide the scores of this scorer"]
    assert rows[6][:2] == ["quality", "100.0%"]
    assert rows[6][2].endswith("by 20 trusted samples and whether the reference agrees")
    said = refused(run, "mimic-curate", f"ledger={tmp_path}/data", "out=b")
    assert said.startswith("mimic-curate: `filter`: Sign() decides by the sign of scores, but ")


def test_unscored_samples_can_be_kept(run, tmp_path):
    text = run("mimic-curate", f"ledger={scored(tmp_path / 'scores')}", "unscored=keep")
    assert cells(text)[1:4] == [
        ["kept", "4", "80.0%"], ["dropped", "1", "20.0%"], ["coverage", "80.0%", "1 without a score are kept"]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "title", "kept"),
    [
        (["filter=threshold"], "Threshold()", [0, 1, 2, 3]),
        (["filter=kmeans", "filter.seed=3"], "KMeans(seed=3)", [0, 1]),
        (["filter=gmm"], "Mixture(seed=0)", [0, 1, 2, 3]),
        (["filter=top_k", "filter.fraction=0.25"], "TopK(fraction=0.25, count=None, per_class=False)", [0]),
        (["filter=top_k", "filter.fraction=null", "filter.count=3"], "TopK(fraction=None, count=3", [0, 1, 2]),
        (["filter=ensemble", "filter.by=majority"], "Ensemble(filters=[Threshold(), KMeans(", [0, 1, 2, 3]),
    ],
)  # fmt: skip
def test_every_filter_can_be_chosen(words, title, kept, run, tmp_path):
    write_scores(tmp_path / "scores", [5.0, 4.0, 1.0, 0.0])
    text = run("mimic-curate", f"ledger={tmp_path}/scores", *words)
    assert f"by {title}" in text.replace("\n", " ")
    rows = Manifest("curated/manifest.parquet").table().to_pylist()
    assert sorted(row["id"] for row in rows if row["keep"]) == kept


@pytest.mark.slow
def test_the_ensemble_weighs_the_votes_of_all_epochs(run, tmp_path):
    generator = np.random.default_rng(0)
    scores = np.where(np.arange(300) < 200, 1.0, -1.0) + 0.3 * generator.standard_normal((3, 300))
    write_scores(tmp_path / "scores", scores, weight=np.where(scores > 0, 1.2, 0.6) / 300)
    run("mimic-curate", f"ledger={tmp_path}/scores", "filter=ensemble")
    made = Manifest("curated/manifest.parquet")
    assert sorted(row["id"] for row in made.table().to_pylist() if row["keep"]) == list(range(200))
    assert made.provenance["facts"]["voters"] == 9
    assert made.table()["votes"].to_pylist() == [9] * 300


def test_curate_says_in_a_sentence_what_is_wrong(run, tmp_path, here):
    ledger = f"ledger={scored(tmp_path / 'scores')}"
    assert refused(run, "mimic-curate") == "mimic-curate: `ledger` is missing; `mimic-curate --help` explains it."
    assert refused(run, "mimic-curate", "ledger=nowhere") == (
        "mimic-curate: nowhere holds no ledger (no _meta.json in it)."
    )
    assert refused(run, "mimic-curate", ledger).startswith("mimic-curate: no decision on 1 of 5 samples, such as ")
    for words, said in (
        (["unscored=kep"], "`unscored` is 'kep'; nearest: 'keep'"),
        (["exports=[cvs]"], "`exports`: 'cvs'; nearest: 'csv'"),
        (["memory=lots"], "`memory` is 'lots'; say it like '2GB'"),
        (["memory=-1GB"], "`memory` is '-1GB'; say it like '2GB'"),
        (["memory=2"], "`memory` is 2; say it like '2GB'"),
        (["exports=csv"], "`exports` is 'csv'; expected a list of csv, datacomp, cleanlab."),
        (["allow_partial=maybe"], "`allow_partial` is 'maybe'; expected true or false."),
        (["out=null"], "`out` is null; expected a directory for the manifest."),
        (["trusted=5", "mislabelled=a"], "`trusted` is 5; expected a path."),
        (["ledger=null"], "`ledger` is None; expected a path."),
        (["pool=[a]"], "`pool` is ['a']; expected a path."),
        (["filter=top_k", "filter.fraction=2"], "`fraction` is 2; expected above 0 and at most 1."),
        (["filter=top_k", "filter.count=2"], "TopK needs exactly one of `fraction` and `count`."),
        (["filter=ensemble", "filter.by=vote"], "`by` is 'vote'; "),
        (["filter=top_k", "filter.per_class=true", "unscored=keep", "pool=none.csv"], "none.csv is not there."),
    ):
        assert refused(run, "mimic-curate", ledger, *words).startswith(f"mimic-curate: {said}")
    assert os.listdir(here) == []
    (here / "curated").mkdir()
    (here / "curated" / "mine").write_text("x")
    assert refused(run, "mimic-curate", ledger) == (
        "mimic-curate: `out`: curated is there already; name another directory, or delete it."
    )


@pytest.mark.parametrize(("command", "word", "said"), [
    ("mimic-curate", "filter=sing", "Could not find 'filter/sing'"),
    ("mimic-curate", "ledgr=x", "Could not override 'ledgr'"),
    ("mimic-select", "recipes=x", "Could not override 'recipes'"),
])  # fmt: skip
def test_an_option_that_is_not_there_is_named(command, word, said, run):
    with pytest.raises(Exception, match=said):
        run(command, word)


def test_select_writes_the_manifest_and_its_exports(run, tmp_path, here):
    ids = [f"{k:032x}" for k in range(5)]
    made = curate(scored(tmp_path / "scores", ids=ids), None, tmp_path / "curated", unscored="keep").manifest
    pq.write_table(pa.table({"id": ids, "clip": [5, 4, 3, 2, 1]}), tmp_path / "clip.parquet")
    recipe = f"recipe={tmp_path}/clip.parquet:clip top 70% minus {made.path}:score bottom 1"
    text = run("mimic-select", recipe, "out=new/final.parquet", "exports=[datacomp,csv]")
    assert text.splitlines()[0] == "new/final.parquet: 3 of 5 samples kept (60.0%)"
    assert os.listdir(here) == ["new"]
    assert sorted(os.listdir("new")) == ["final.kept.npy", "final.manifest.csv", "final.parquet"]
    assert np.load("new/final.kept.npy").tolist() == [(0, 0), (0, 1), (0, 2)]
    table = Manifest("new/final.parquet").table()
    assert [row["id"] for row in table.to_pylist() if row["keep"]] == ids[:3]


def test_select_says_in_a_sentence_what_is_wrong(run, tmp_path, here):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1, 2], "keep": [True, True]}), path)
    pq.write_table(pa.table({"id": [1], "keep": [True]}), tmp_path / "b.parquet")
    missing = "mimic-select: `recipe` is missing; `mimic-select --help` explains it."
    assert refused(run, "mimic-select", "out=o.parquet") == missing
    for words, said in (
        ([f"recipe={path}", "out=o.csv"], "`out` is o.csv; expected a path that ends in .parquet."),
        (["recipe=a", "out=o.parquet"], "`recipe`: 'a' cannot be read; expected PATH"),
        ([f"recipe={path}", "out=o.parquet", "exports=[x]"], "`exports`: 'x'; "),
        (
            [f"recipe={path} or {tmp_path}/b.parquet", "out=o.parquet"],
            f"1 samples of {path}, such as 2, are not in",
        ),
    ):
        assert refused(run, "mimic-select", *words).startswith(f"mimic-select: {said}")
    assert os.listdir(here) == []
    recipe = f"recipe={path} or {tmp_path}/b.parquet"
    assert run("mimic-select", recipe, "out=o.parquet", "allow_unknown=true").startswith("o.parquet: 2 of 2 samples")


@pytest.mark.parametrize("export", ["datacomp", "cleanlab"])
def test_a_selection_that_cannot_be_exported_is_refused_before_it_is_written(export, run, tmp_path, here):
    pq.write_table(pa.table({"id": [1, 2], "keep": [True, True]}), tmp_path / "a.parquet")
    said = refused(run, "mimic-select", f"recipe={tmp_path}/a.parquet", "out=o.parquet", f"exports=[csv,{export}]")
    assert said.startswith("mimic-select: DataComp's" if export == "datacomp" else "mimic-select: cleanlab's")
    assert os.listdir(here) == []


def test_a_selection_of_no_samples_is_said_so(run, tmp_path):
    pq.write_table(pa.table({"id": pa.array([], pa.int64()), "keep": pa.array([], pa.bool_())}), tmp_path / "a.parquet")
    assert "o.parquet: 0 of 0 samples kept" in run("mimic-select", f"recipe={tmp_path}/a.parquet", "out=o.parquet")


def test_compare_shows_the_best_first_and_draws_it(run, tmp_path, here):
    kept = {}
    for name, share in (("low", 0.25), ("high", 0.75), ("middle", 0.5)):
        write_scores(tmp_path / name / "scores", np.arange(20) < 20 * share, ids=range(20))
        write_scores(tmp_path / name / "data", np.where(np.arange(20) < 20 * share, 1.0, -1.0))
        kept[name] = curate(tmp_path / name / "data", None, tmp_path / name / "out").manifest.path
    manifests = "manifests={" + ", ".join(f"{name}: {path}" for name, path in kept.items()) + "}"
    text = run("mimic-compare", manifests, "noise={low: 0.7, high: 0.3, middle: 0.5}", "plot=quality.png")
    head, *rows = cells(text)
    heads = [
        "data set",
        "samples",
        "kept",
        "mean score",
        "score of 0 or more",
        "quality",
        "95 % interval",
        "truly good",
    ]
    assert head == heads
    assert rows == [
        ["high", "20", "75.0%", "+1", "75.0%", "–", "–", "70.0%"],
        ["middle", "20", "50.0%", "+1", "50.0%", "–", "–", "50.0%"],
        ["low", "20", "25.0%", "+1", "25.0%", "–", "–", "30.0%"],
    ]
    assert text.splitlines()[0] == "References: high: not diagnosed, middle: not diagnosed, low: not diagnosed."
    assert "Correlation with the truth: 1.000 (Pearson), 1.000 (Spearman)." in text
    assert text.splitlines()[-1] == "quality.png"
    assert os.listdir(here) == ["quality.png"]
    assert (here / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_compare_shows_intervals_where_the_quality_is_known(run, tmp_path, here):
    write_scores(tmp_path / "data", [1.0, -1.0])
    write_scores(tmp_path / "right", [1.0] * 20)
    write_scores(tmp_path / "wrong", [-1.0] * 20)
    done = curate(tmp_path / "data", None, tmp_path / "out", trusted=tmp_path / "right", mislabelled=tmp_path / "wrong")
    text = run("mimic-compare", f"manifests={{7: {done.manifest.path}}}")
    interval = f"{done.quality.low:.1%} to {done.quality.high:.1%}"
    assert cells(text)[1:] == [["7", "2", "50.0%", "+1", "50.0%", "50.0%", interval, "–"]]
    assert "Correlation" not in text
    assert os.listdir(here) == []


def test_compare_begins_with_the_verdicts_and_shows_estimated_shares(run, tmp_path):
    paths = {}
    for name, facts in (("a", {"calibration": SHARE}), ("b", {"diagnosis": DOUBTFUL})):
        write_ledger(tmp_path / name, {"id": [1, 2], "score": [1.0, -1.0]}, notes=facts)
        paths[name] = curate(tmp_path / name, None, tmp_path / f"{name}o", accept_verdict=True).manifest.path
    text = run("mimic-compare", f"manifests={{a: {paths['a']}, b: {paths['b']}}}")
    assert text.splitlines()[0] == "References: a: not diagnosed, b: doubtful."
    assert "Wrong labels, as the calibrated references estimate: a: 25.0%.\n" in text


def test_compare_says_in_a_sentence_what_is_wrong(run, tmp_path):
    missing = "mimic-compare: `manifests` is missing; `mimic-compare --help` explains it."
    assert refused(run, "mimic-compare") == missing
    assert refused(run, "mimic-compare", "manifests={}") == "mimic-compare: there are no manifests to compare."
    none = "mimic-compare: none.parquet is no manifest: there is no such file."
    assert refused(run, "mimic-compare", "manifests={a: none.parquet}") == none


@pytest.mark.parametrize("word", ["manifests=a.parquet", "manifests=[a.parquet]", "manifests=null"])
def test_manifests_without_names_are_refused_in_a_sentence(word, run):
    assert refused(run, "mimic-compare", word).startswith("mimic-compare: `manifests`")


def test_a_curation_by_the_shell_ends_with_a_sentence_or_with_nothing_on_stderr(tmp_path, here):
    ledger = scored(tmp_path / "scores")
    code = "from lightning_mimic.cli.curate import curate_main; curate_main()"
    for word, status in (("unscored=drop", 0), ("unscored=fail", 2)):
        command = [sys.executable, "-c", code, f"ledger={ledger}", word, f"out=o{status}"]
        environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == status
        assert done.stderr.startswith("mimic-curate: no decision on 1 of 5 samples") if status else done.stderr == ""
        assert len(done.stderr.splitlines()) == (1 if status else 0)
    assert os.listdir(here) == ["o0"]
    assert json.loads(pq.read_schema(here / "o0" / "manifest.parquet").metadata[b"lightning_mimic"])["kept"] == 3
