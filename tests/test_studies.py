"""Studies: the choice cannot see the test split, what was broken off goes on, and tables say what ran."""

import csv
import itertools
import json
import math
import sys
from importlib import import_module
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from matplotlib.text import Text
from omegaconf import OmegaConf
from rich.console import Console

from lightning_mimic import Ledger
from lightning_mimic.data.digits import DigitsDataModule
from scripts import provenance
from scripts.studies import __main__ as command
from scripts.studies import digits, figures, job, lab, paper, paper_figures
from scripts.studies.lab import Lab, Run, Runs, StudyError
from scripts.studies.study import Part, Study, carry_out
from scripts.studies.tables import Table, write
from support.cases import case

FAST = ["trainer.max_epochs=1", "data.batch_size=1097"]
CONSOLE = Console(quiet=True)
# The joblib launcher's import warns of a deprecation of its own.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:hydra_plugins")
TRAIN = job.train


class Trained:
    """In the place of mimic-train's function: counts, and breaks off one run after its scores, before its result."""

    ran = 0
    breaks_at = math.inf

    @classmethod
    def train(cls, config, callbacks):
        cls.ran += 1
        trainer = TRAIN(config, callbacks)
        if cls.ran == cls.breaks_at:
            raise KeyboardInterrupt
        return trainer


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Runs the command in this process, with few steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(job, "train", Trained.train)
    monkeypatch.setattr(paper, "FRACTIONS", (0.5,))
    monkeypatch.setattr(Trained, "ran", 0)
    monkeypatch.setattr(Trained, "breaks_at", math.inf)

    def run(out, *words):
        argv = ["studies", "paper", "--parts", "efficiency", "--seeds", "0", "1", "--jobs", "1", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", [*argv, *words, *FAST])
        command.main()

    return run


def rows_of(out):
    return (out / "tables" / "efficiency" / "tables.csv").read_text()


@pytest.mark.slow
def test_what_was_broken_off_goes_on_and_gives_the_same_tables(runs, monkeypatch, capsys):
    runs(Path("whole"), "--markdown", "page.md")
    made = Trained.ran
    assert made == 2 + 4 + 2 + 4 + 2  # pretrained, references, scored, parts, everything
    assert sum(1 for _ in Path("whole").rglob("result.json")) == made
    report = Path("whole/report")

    scores = {row["id"]: row["score"] for row in Ledger(report / "scored/official/0/scores").table().to_pylist()}
    chosen = {}
    for pick in ("mimic", "random"):
        rows = pq.read_table(report / "efficiency" / pick / "0.5/0/manifest.parquet").to_pylist()
        chosen[pick] = {row["id"] for row in rows if row["keep"]}
    assert min(scores[each] for each in chosen["mimic"]) >= max(scores[each] for each in {*scores} - chosen["mimic"])
    assert len(chosen["random"]) == len(chosen["mimic"])
    assert 0.3 < len(chosen["random"] & chosen["mimic"]) / len(chosen["mimic"]) < 0.7

    monkeypatch.setattr(Trained, "ran", 0)
    for breaks_at in (5, 6):  # a reference, a part
        monkeypatch.setattr(Trained, "breaks_at", Trained.ran + breaks_at)
        with pytest.raises(SystemExit, match=r"stopped. What is done is kept; the same command goes on"):
            runs(Path("broken"))
    assert not (Path("broken") / "tables").exists()
    runs(Path("broken"))
    assert Trained.ran == made + 2  # only the two that were broken off ran twice
    assert rows_of(Path("broken")) == rows_of(Path("whole"))
    runs(Path("broken"))
    assert Trained.ran == made + 2

    with pytest.raises(SystemExit):
        runs(Path("broken"), "model.optimizer.lr=1")
    assert "was run with other settings; name another --out, or delete it" in capsys.readouterr().err
    page = Path("page.md").read_text()
    assert page.startswith("<!-- study paper_digits efficiency: begin -->")
    assert f"commit: {provenance.commit()} ({made} runs)" in page
    assert "python -m scripts.studies paper --parts efficiency --seeds 0 1" in page
    # Which split, and which reference, a run used.
    for seed in (0, 1):
        saved = {
            kind: torch.load(report / f"references/probe/{kind}/{seed + 100}/model.ckpt", weights_only=True)[
                "state_dict"
            ]
            for kind in ("seen", "trusted_split")
        }
        pretrained = torch.load(report / f"pretrained/{seed + 1000}/model.ckpt", weights_only=True)["state_dict"]
        for each in saved.values():
            name = "backbone.layers.0.weight"
            torch.testing.assert_close(each[name], pretrained[name], rtol=0, atol=0)
        assert not torch.equal(*(each["head.weight"] for each in saved.values()))


class Recorded(Lab):
    """Runs nothing: remembers what was asked for and gives plausible results."""

    def __init__(self, out, phase="report", seeds=(0, 3)):
        super().__init__(out, phase, seeds, 1, [], CONSOLE)
        self.asked = {}

    def sweep(self, name, each, *fixed):
        assert name not in self.asked or self.asked[name] == (dict(each), fixed), f"{name} has two kinds of runs"
        self.asked[name] = dict(each), fixed
        filters = {f: {"auroc": 0.9, "f1": 0.9, "share_kept": 0.6, "share_right": 0.6} for f in job.FILTERS}
        curves = {"accuracy": [0.5, 0.9], "held_loss": [2.0, 1.0], "steps": [1, 2]}
        result = {"accuracy": 0.9, "best_accuracy": 0.9, "auroc": 0.9, "first_auroc": 0.9, "ess": 0.5}
        result |= {"filters": filters, "curves": curves, "verdict": "compatible", "commit": ""}
        asked = [dict(zip(each, values, strict=True)) for values in itertools.product(*each.values())]
        # The seed decides where a network begins.
        return Runs(Run(v, self.folder(name, *v.values()), {**result, "start": str(v["seed"])}) for v in asked)


def settings(values, fixed):
    """Of one run, with what it takes from its seed."""
    given = dict(word.split("=", 1) for word in fixed)
    given |= {key: str(value) for key, value in values.items()}
    config = OmegaConf.create({"seed": int(given["seed"]), "data": {}, "kind": given.get("reference", "seen")})
    resolved = {}
    for key in ("data.split_seed", "paths.reference", "paths.pretrained", "+study.scored"):
        if key in given:
            text = given[key].strip('"').replace("${hydra:runtime.choices.reference}", config.kind)
            config.data.split_seed = resolved.get("data.split_seed", 0)
            resolved[key] = OmegaConf.create({**config, "it": text}).it
    return given | {key: str(value) for key, value in resolved.items()}


@pytest.mark.parametrize("data", ["digits", "cifar10", "dtd"])
def test_every_run_of_the_papers_tables_finds_what_runs_before_it_made(data, tmp_path):
    made, asked = {}, Recorded(tmp_path)
    sweep = asked.sweep

    def checked(name, each, *fixed):
        runs = sweep(name, each, *fixed)
        for run in runs:
            given = settings(run.values, fixed)
            split = str(int(given["seed"]) % 100) if data == "digits" else None
            assert given.get("data.split_seed") == split
            if "paper/reference" in given["experiment"]:
                same = name == "references/same"
                assert (int(given["seed"]) < 100) == same
            for key in ("paths.reference", "paths.pretrained", "+study.scored"):
                # What trains plainly asks for no reference.
                if key not in given or (key == "paths.reference" and given.get("mimic", "none") == "none"):
                    continue
                before = made[Path(given[key]).parent]
                # Trained on the same split, and of a reference the same kind and as much of the network.
                assert before.get("data.split_seed") == given.get("data.split_seed")
                assert int(before["seed"]) % 100 == int(given["seed"]) % 100
                if key == "paths.reference" and "corrupted" not in given[key]:
                    assert before["reference"] == given.get("reference", "seen")
                    assert before.get("model.freeze_backbone") == given.get("model.freeze_backbone")
                assert before.get("model.backbone.features") == given.get("model.backbone.features")
            made[run.folder] = given
        return runs

    asked.sweep = checked
    for part in paper.study(data).parts.values():
        tables = list(part.report(asked, {}))
        assert tables
        # Of shares that are all the same there is no correlation.
        assert all(t.figures(*place) for t in tables for place in t.cells if place[1] != "correlation")
    assert ("pretrained" in asked.asked) == (data == "digits")


@pytest.mark.parametrize("name", [name for name in command.STUDIES if name != "paper"])
def test_a_study_chooses_and_reports_on_seeds_that_never_meet(name):
    study = import_module(f"scripts.studies.{name}").STUDY
    for part in study.parts.values():
        assert not {*(part.seeds or study.seeds)} & {*study.chosen_on}


@pytest.mark.parametrize("name", ["aligned", "depth"])
def test_references_of_a_choice_have_not_seen_what_validates(name, tmp_path):
    for part in import_module(f"scripts.studies.{name}").STUDY.parts.values():
        choosing, reporting = Recorded(tmp_path, "choose", (10, 11)), Recorded(tmp_path, "report")
        tables = list(part.report(reporting, json.loads(json.dumps(part.choose(choosing)))))
        assert all(table.cells for table in tables)
        for asked, images in ((choosing, "data.train=trusted_fit"), (reporting, "data.train=trusted")):
            made = {sweep: fixed for sweep, (_, fixed) in asked.asked.items() if sweep.startswith("references")}
            assert made
            assert all(images in fixed for fixed in made.values())


def test_seeds_that_choose_are_refused_in_the_report(tmp_path):
    part = Part(lambda lab, chosen: [], choose=lambda lab: {})
    study = Study("", {"one": part})
    with pytest.raises(StudyError, match=r"seeds \[11\] are among those that choose settings \(\[10, 11, 12\]\)"):
        carry_out(study, "one", tmp_path, [0, 11], 1, [], CONSOLE)
    carry_out(Study("", {"one": Part(lambda lab, chosen: [])}), "one", tmp_path, [0, 11], 1, [], CONSOLE)


@pytest.mark.slow
def test_a_choice_that_reads_the_test_split_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    asks = ["experiment=digits_reference", "paths.reference=${hydra:runtime.output_dir}/model.ckpt", digits.EACH_EPOCH]
    given = Lab(tmp_path, "choose", [10], 1, FAST, CONSOLE)
    (run,) = given.sweep("fine", {"seed": [10]}, *asks, "data.train=trusted_fit")
    data = DigitsDataModule()
    data.setup()
    held, test = (len(data.rows[part]) for part in ("trusted_held", "test"))
    assert (run.result["accuracy"] * held) == pytest.approx(round(run.result["accuracy"] * held))
    (run,) = Lab(tmp_path, "report", [0], 1, FAST, CONSOLE).sweep("tested", {"seed": [0]}, *asks)
    assert (run.result["accuracy"] * test) == pytest.approx(round(run.result["accuracy"] * test))

    monkeypatch.setattr(job.Watch, "_loader", lambda self, data: data.test_dataloader())
    with pytest.raises(RuntimeError, match="the test split was asked for while the study chooses"):
        given.sweep("peeks", {"seed": [10]}, *asks, "data.train=trusted_fit")
    job.seal(data)
    with pytest.raises(RuntimeError, match="the test split was asked for"):
        data.test_dataloader()
    assert "test" not in data.rows


def test_what_is_mapped_is_kept_and_resumed(tmp_path):
    given = Lab(tmp_path, "report", [0], 1, [], CONSOLE)
    assert [r["root"] for r in given.map("roots", root, [(4,), (9,)])] == [2, 3]
    result = tmp_path / "roots" / "4" / "result.json"
    result.write_text(json.dumps({"root": 7, "commit": "earlier"}))
    assert [r["root"] for r in given.map("roots", root, [(4,), (9,), (16,)])] == [7, 3, 4]
    assert list(given.commits.values()).count("earlier") == 1
    with pytest.raises(StudyError, match="was run with other settings"):
        given.map("roots", square, [(4,)])


def root(number):
    return {"root": math.isqrt(number)}


def square(number):
    return {"square": number**2}


def test_the_best_choice_is_the_shortest_of_equals_and_then_the_first():
    assert lab.best({1: [[0.5, 0.9, 0.9]], 2: [[0.9, 0.1, 0.1]]}) == (2, 1)
    assert lab.best({1: [[0.5, 0.9, 0.9]], 2: [[0.1, 0.9, 0.1]]}) == (1, 2)
    assert lab.best({1: [[0.2, 0.4], [0.8, 0.2]], 2: [[0.6], [0.6]]}) == (2, 1)


def test_tables_hold_means_over_the_seeds_and_the_papers_figures(tmp_path):
    cells = {("Grad-Mimic", "40 %"): [90.0, 94.0], ("plain", "40 %"): [], ("plain", "word"): "compatible 3"}
    cells["Grad-Mimic", "gap"] = [1.0, 2.0]
    given = {("Grad-Mimic", "40 %"): 94.15, ("plain", "40 %"): 92.0}
    table = Table("probe_seen", "A title", "method", cells, ["gap"], given, paper_figures.SOURCE)
    heading, *rows = table.lines()
    assert heading == ["method", "40 %", "paper 40 %", "ours - paper", "word", "gap"]
    assert rows == [
        ["Grad-Mimic", "92.0 ± 2.8", "94.15", "-2.15", "–", "+1.5 ± 0.7"],
        ["plain", "–", "–", "–", "compatible 3", "–"],
    ]
    written = write([table], {"seeds": "0, 1", "commit": "abc"}, tmp_path)
    assert [path.name for path in written] == ["tables.md", "tables.csv"]
    with written[1].open() as file:
        row, *_ = csv.DictReader(file)
    assert (row["row"], row["column"], row["paper"]) == ("Grad-Mimic", "40 %", "94.15")
    assert float(row["mean"]) == pytest.approx(92)
    assert float(row["ours_minus_paper"]) == pytest.approx(-2.15)
    text = written[0].read_text()
    assert text.count(paper_figures.SOURCE) == 1
    assert "seeds: 0, 1; commit: abc" in text


@pytest.mark.slow
def test_every_figure_is_drawn_from_the_tables_of_its_page(tmp_path):
    assert figures.spread("94.8 ± 0.6") == figures.Spread(94.8, 0.6)
    assert figures.spread("+1.5") == figures.Spread(1.5, 0.0)
    assert figures.spread("compatible 3") is None
    cells = figures.spreads("paper_digits", "**Linear probe with a reference from trusted images: test accuracy")
    assert {row for row, _ in cells} >= set(figures.STYLES)
    assert {column for _, column in cells} == {"40 %", "50 %", "60 %"}
    for name, draw in figures.FIGURES.items():
        with case(name):
            figure = draw()
            figure.savefig(tmp_path / f"{name}.png")
            assert figure.get_figwidth() == figures.WIDTH
            sizes = [text.get_fontsize() for text in figure.findobj(Text) if text.get_text()]
            assert min(sizes) >= 8  # 11 pixels at the width of a README
            assert (figures.ROOT / "docs" / "images" / f"{name}.png").is_file()
    with pytest.raises(ValueError, match="has no table after 'no such title'"):
        figures.table_after("paper_digits", "no such title")


def test_a_section_of_a_page_is_replaced_and_all_else_stays(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Results\n\nwords\n")
    for text in ("first", "second"):
        provenance.write_section(page, "study one", text)
        provenance.write_section(page, "study two", "other")
    assert page.read_text() == (
        "# Results\n\nwords\n\n<!-- study one: begin -->\n\nsecond\n\n<!-- study one: end -->\n\n"
        "<!-- study two: begin -->\n\nother\n\n<!-- study two: end -->\n"
    )


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        (lambda seed, rate: 0.5 + (0.5 - rate) / 2 if seed == 0 else 0.5 - (0.5 - rate) / 2, [100, -100]),
        (lambda seed, rate: 1.0, []),
    ],
)
def test_the_correlation_of_what_is_kept_with_what_is_right(kept, expected, tmp_path):
    class Shares(Recorded):
        def sweep(self, name, each, *fixed):
            runs = super().sweep(name, each, *fixed)
            if name != "quality":
                return runs
            return Runs(Run(run.values, run.folder, {"filters": self.filters(run.values)}) for run in runs)

        def filters(self, values):
            shares = {"share_kept": kept(values["seed"], values["data.noise.rate"])}
            return dict.fromkeys(job.FILTERS, shares | {"share_right": 1 - values["data.noise.rate"]})

    (table,) = paper.quality("digits", Shares(tmp_path, seeds=(0, 1)), {})
    assert table.figures("sign, seen", "correlation") == pytest.approx(expected)


def test_the_papers_linear_probe_is_whole():
    for data in paper_figures.LINEAR_PROBE:
        figures = paper_figures.linear_probe(data)
        assert len(figures) == 6
        for rate in ("40 %", "50 %", "60 %"):
            assert figures["Grad-Mimic", rate] > figures["plain", rate]
    assert set(paper_figures.LINEAR_PROBE) | {"digits"} == set(paper.DATA)
    assert paper_figures.linear_probe("digits") == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["papers"], "invalid choice"),
        (["paper", "--data", "cifar"], "invalid choice"),
        (["paper", "--parts", "prob"], "--parts: prob: paper has probe, full, quality"),
    ],
)
def test_an_unknown_study_part_or_data_set_is_refused(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["studies", *words])
    with pytest.raises(SystemExit):
        command.main()
    assert said in capsys.readouterr().err
