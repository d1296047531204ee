"""The paper's tables: every run finds what it needs, an interrupted reproduction goes on, and tables say what ran."""

import contextlib
import csv
import json
import math
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from hydra.errors import ConfigCompositionException

sys.path.append(str(Path(__file__).parent.parent / "scripts"))
import paper_figures
import reproduce
import reproduce_job
import reproduce_plan
import reproduce_report
import reproduce_tables
from reproduce_tables import tables_of

from lightning_mimic import Ledger
from lightning_mimic.data.digits import DigitsDataModule

FAST = ["trainer.max_epochs=1", "data.batch_size=1097"]
# The joblib launcher's import warns of a deprecation of its own.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:hydra_plugins")


class Here:
    """In the place of subprocess.Popen: runs the sweep in this process."""

    ran = 0
    breaks_at = math.inf

    def __init__(self, command, env=None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", command[1:])
            patch.setattr(reproduce_job, "train", self.trained)
            try:
                reproduce_job.main()
                self.returncode = 0
            except KeyboardInterrupt:
                self.returncode = 1

    @classmethod
    def trained(cls, config):
        cls.ran += 1
        if cls.ran == cls.breaks_at:  # after its scores, before its result
            TRAIN(config)
            raise KeyboardInterrupt
        return TRAIN(config)

    def __enter__(self):
        return self

    def __exit__(self, *what):
        return None

    def poll(self):
        return self.returncode


TRAIN = reproduce_job.train


@pytest.fixture
def small(monkeypatch, tmp_path):
    """One fraction, few steps, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(reproduce.subprocess, "Popen", Here)
    for module in (reproduce_plan, reproduce_tables):
        monkeypatch.setattr(module, "FRACTIONS", (0.5,))
    monkeypatch.setattr(Here, "ran", 0)
    monkeypatch.setattr(Here, "breaks_at", math.inf)

    def runs(out, *words):
        monkeypatch.setattr(sys, "argv", ["reproduce.py", "--seeds", "0", "1", "--out", str(out), *words, *FAST])
        reproduce.main()

    return runs


def files(out):
    return [(out / "digits" / name).read_text() for name in ("tables.md", "tables.csv")]


def test_what_was_broken_off_goes_on_and_gives_the_same_tables(small, monkeypatch, capsys):
    tables = ["--tables", "efficiency"]
    small(Path("whole"), *tables)
    runs = Here.ran
    assert runs == 2 + 4 + 2 + 4 + 2  # pretrained, references, scored, parts, everything
    assert sum(1 for _ in Path("whole").rglob("result.json")) == runs

    scores = {row["id"]: row["score"] for row in Ledger("whole/digits/scored/official/0/scores").table().to_pylist()}
    chosen = {}
    for pick in ("mimic", "random"):
        rows = pq.read_table(Path("whole/digits/efficiency", pick, "0.5", "0", "manifest.parquet")).to_pylist()
        chosen[pick] = {row["id"] for row in rows if row["keep"]}
    best = min(scores[each] for each in chosen["mimic"])
    assert best >= max(scores[each] for each in scores.keys() - chosen["mimic"])
    assert len(chosen["random"]) == len(chosen["mimic"])
    assert 0.3 < len(chosen["random"] & chosen["mimic"]) / len(chosen["mimic"]) < 0.7

    monkeypatch.setattr(Here, "ran", 0)
    for breaks_at in (5, 6):  # a reference, a part
        monkeypatch.setattr(Here, "breaks_at", Here.ran + breaks_at)
        with pytest.raises(SystemExit, match="What is done is kept; the same command goes on from there"):
            small(Path("broken"), *tables)
    assert not (Path("broken") / "digits" / "tables.md").exists()
    small(Path("broken"), *tables)
    assert Here.ran == runs + 2  # only the two that were broken off ran twice
    for whole, broken in zip(files(Path("whole")), files(Path("broken")), strict=True):
        assert whole == broken
    small(Path("broken"), *tables)
    assert Here.ran == runs + 2

    with pytest.raises(SystemExit, match=r"pretrained/0 was run with other settings; name another --out, or delete it"):
        small(Path("broken"), *tables, "model.optimizer.lr=1")
    shown = capsys.readouterr().out
    assert "Data efficiency, 40 % wrong labels" in " ".join(shown.split())
    # Which split, and which reference, a run used.
    for seed in (0, 1):
        data = DigitsDataModule(seed=seed)
        data.setup()
        saved = [
            torch.load(Path("whole/digits/references/probe", str(seed), kind, "model.ckpt"), weights_only=True)
            for kind in ("seen", "trusted_split")
        ]
        pretrained = torch.load(Path("whole/digits/pretrained", str(seed), "model.ckpt"), weights_only=True)
        for each in saved:
            name = "backbone.layers.0.weight"
            torch.testing.assert_close(each["state_dict"][name], pretrained["state_dict"][name], rtol=0, atol=0)
        assert not torch.equal(*(each["state_dict"]["head.weight"] for each in saved))


def said(sweep, folder):
    """The overrides of one run, references to others replaced."""
    swept = dict(zip(sweep.swept, folder.parts[-len(sweep.swept) :] if sweep.swept else (), strict=True))
    given = dict(word.split("=", 1) for word in sweep.fixed) | swept
    given.setdefault("reference", "seen")
    for key in given:
        for name, value in (("seed", given["seed"]), ("hydra:runtime.choices.reference", given["reference"])):
            given[key] = given[key].replace(f"${{{name}}}", value)
    return given


@pytest.mark.parametrize("data", ["digits", "cifar10", "dtd"])
def test_every_run_finds_what_runs_before_it_made(data):
    out, made, names = Path("out"), {}, set()
    for sweep in reproduce_plan.Plan(data, (0, 3), out).sweeps(reproduce_plan.TABLES):
        assert sweep.name not in names
        names.add(sweep.name)
        folders = sweep.folders(out)
        assert len(set(folders)) == len(folders)
        for folder in folders:
            given = said(sweep, folder)
            if "paper/reference" in given["experiment"]:  # of another seed than the run, unless it is said
                same = sweep.name.startswith("references/same")
                of_run = int(sweep.name.rsplit("/", 1)[-1])
                assert int(given["seed"]) - of_run == (0 if same else 100)
                assert given.get("data.seed", str(of_run)) == str(of_run)
            elif data == "digits" and "pretrained" not in given["experiment"]:
                assert given["data.seed"] == given["seed"]
            for key in ("paths.reference", "paths.pretrained", "+scored"):
                # What trains plainly asks for no reference.
                asks = key != "paths.reference" or given.get("mimic", "none") != "none"
                if key in given and asks:
                    before = made[Path(given[key]).parent]
                    # Trained on the same split, and of a reference the same kind and as much of the network.
                    assert before.get("data.seed") == given.get("data.seed")
                    if key == "paths.reference" and "corrupted" not in given[key]:
                        assert before["reference"] == given["reference"]
                        whole = "model.freeze_backbone"
                        assert before.get(whole) == given.get(whole)
                    features = "model.backbone.features"
                    assert before.get(features) == given.get(features)
        made |= {folder: said(sweep, folder) for folder in folders}
    assert any(name.startswith("pretrained") for name in names) == (data == "digits")


def result(folder: Path, **figures):
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(figures))


def test_tables_hold_means_over_the_seeds_that_were_asked_for_and_the_papers_figures(tmp_path):
    for seed, value in ((0, 0.90), (1, 0.94), (7, 0.1)):
        result(tmp_path / "probe_seen" / "seen" / "official" / "0.4" / str(seed), accuracy=value, filters={}, ess=1)
    tables = tables_of("cifar10", ["probe"], (0, 1), tmp_path)
    (heading, *rows) = tables[0].lines()
    assert heading[:4] == ["method", "40 %", "paper 40 %", "ours - paper"]
    by_name = {row[0]: row[1:4] for row in rows}
    assert by_name["Grad-Mimic"] == ["92.0 ± 2.8", "94.15", "-2.15"]
    assert by_name["plain"] == ["–", "–", "–"]
    # The paper has no figures for a reference that has not seen the images.
    assert not tables[1].paper
    written = reproduce_report.write(tables, tmp_path)
    assert [path.name for path in written] == ["tables.md", "tables.csv", "tables.png"]
    with written[1].open() as file:
        (row,) = [r for r in csv.DictReader(file) if r["table"] == "probe_seen" and r["seeds"] == "2"]
    assert (row["row"], row["column"], row["paper"]) == ("Grad-Mimic", "40 %", "94.15")
    assert float(row["mean"]) == pytest.approx(92)
    assert float(row["ours_minus_paper"]) == pytest.approx(-2.15)
    assert written[0].read_text().count(paper_figures.SOURCE) == 1
    assert written[2].stat().st_size > 10_000


def test_a_correlation_is_one_where_what_is_kept_is_what_is_right(tmp_path):
    for rate in reproduce_plan.ALL_RATES:
        for seed, slope in ((0, 1), (1, -1)):
            share = {"share_kept": 0.5 + slope * (0.5 - rate) / 2, "share_right": 1 - rate}
            filters = dict.fromkeys(("sign", "label model of the last three"), share)
            result(tmp_path / "quality" / "seen" / "official" / str(rate) / str(seed), filters=filters)
    (table,) = tables_of("digits", ["quality"], (0, 1), tmp_path)
    assert table.cells["sign, seen", "correlation"] == pytest.approx([100, -100])
    assert table.cells["sign, seen", "0 %"] == pytest.approx([75, 25])


def test_a_correlation_needs_every_run_and_shares_that_differ(tmp_path):
    for rate in reproduce_plan.ALL_RATES:
        for seed in (0, 1):
            share = {"share_kept": 1.0, "share_right": 1 - rate}
            refused = {"refused": "all voters say the same"}
            filters = {"sign": share, "label model of the last three": refused if seed and not rate else share}
            result(tmp_path / "quality" / "seen" / "official" / str(rate) / str(seed), filters=filters)
    (table,) = tables_of("digits", ["quality"], (0, 1), tmp_path)
    assert table.cells["sign, seen", "correlation"] == []
    assert ("label model of the last three, seen", "correlation") not in table.cells
    assert "–" in next(line for line in table.lines() if line[0] == "sign, seen")


def test_a_command_that_did_nothing_may_be_put_right(small, monkeypatch):
    with pytest.raises(ConfigCompositionException, match="limit_train_batches"):
        small(Path("out"), "--tables", "efficiency", "trainer.limit_train_batches=1")
    monkeypatch.setattr(Here, "breaks_at", 1)
    with pytest.raises(SystemExit, match=r"^pretrained/0 stopped\. What is done is kept; "):
        small(Path("out"), "--tables", "efficiency")


def test_the_papers_linear_probe_is_whole():
    for data in paper_figures.LINEAR_PROBE:
        figures = paper_figures.linear_probe(data)
        assert len(figures) == 6
        for rate in ("40 %", "50 %", "60 %"):
            assert figures["Grad-Mimic", rate] > figures["plain", rate]
    assert set(paper_figures.LINEAR_PROBE) | {"digits"} == set(reproduce.DATA)
    assert paper_figures.linear_probe("digits") == {}


def test_an_unknown_data_set_or_table_is_refused(monkeypatch, capsys):
    for words in (["--data", "cifar"], ["--tables", "prob"]):
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *words])
        with pytest.raises(SystemExit), contextlib.redirect_stdout(None):
            reproduce.main()
        assert "invalid choice" in capsys.readouterr().err
