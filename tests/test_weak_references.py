"""The study of weak references: samples that never meet, known noise, and criteria with known answers."""

import itertools

import pytest
import torch
from rich.console import Console

from lightning_mimic.data.digits import DigitsDataModule
from scripts.studies import weak_cells, weak_references
from scripts.studies.lab import Lab
from scripts.studies.weak_cells import InstanceNoise, found, images, make_cell
from scripts.studies.weak_references import (
    CORE_NOISES,
    CORE_REFERENCES,
    CRITERIA,
    STUDY,
    TITLES,
    Results,
    summary,
    tables,
)


def test_images_that_choose_are_neither_those_that_report_nor_those_that_train():
    digits = DigitsDataModule(split_seed=40)
    digits.setup()
    test = {image.numpy().tobytes() for image in digits.images(digits.rows["test"])}
    chosen, reported = images(40, "choose"), images(40, "report")
    parts = [{image.numpy().tobytes() for image in chosen[name].inputs} for name in ("checked", "noisy", "evaluation")]
    assert all(not a & b for a, b in itertools.combinations([*parts, test], 2))
    assert {image.numpy().tobytes() for image in reported["evaluation"].inputs} == test
    for name in ("checked", "noisy"):
        torch.testing.assert_close(chosen[name].inputs, reported[name].inputs, rtol=0, atol=0)


def test_noise_by_difficulty_takes_the_least_sure_and_gives_them_the_next_class():
    outputs = torch.tensor([[5.0, 0.0, 1.0], [1.0, 0.9, 0.0], [0.0, 3.0, 2.9], [0.0, 1.0, 9.0]])
    noisy, wrong = InstanceNoise(0.5, outputs)(torch.tensor([0, 0, 1, 2]), 3)
    assert wrong.tolist() == [False, True, True, False]
    assert noisy.tolist() == [0, 1, 2, 2]


def test_what_is_found_counts_samples_without_a_score_as_kept():
    wrong = torch.tensor([True, False, False, False])
    figures = found(torch.tensor([-1.0, torch.nan, 1.0, 2.0]), torch.tensor([True, False, False, False]), wrong)
    assert figures == {"kept": 0.75, "auroc": 1.0, "average_precision": 1.0, "f1": 1.0}
    assert found(torch.full((4,), torch.nan), None, wrong) == {}
    assert set(found(torch.zeros(4), None, wrong)) == {"auroc", "average_precision"}


def measured(**changed):
    """Results of the core in which the recommended method is as good as it must be, but for some figures."""
    results = Results([50, 51])
    for setting, noise, reference in itertools.product(("frozen", "scratch"), CORE_NOISES, CORE_REFERENCES):
        truth = 0.4 if noise == "pairs" else int(noise) / 100
        for seed in results.seeds:
            good = {"last": 0.9, "best": 0.9, "ess": 0.5, "kept": 1 - truth, "auroc": 0.99, "estimate": truth}
            of = {name: dict(good) for name in TITLES} | {"truth": truth}
            of["posterior"]["last"] = 0.91
            if (setting, noise, reference) == changed.get("cell"):
                of[changed["name"]] |= changed["figures"]
            results.add((setting, noise, reference), seed, of)
    return results


def met(results):
    return [criterion.row(results, results.cells)["met"] for criterion in CRITERIA]


@pytest.mark.parametrize(
    ("cell", "name", "figures", "fails"),
    [
        (("frozen", "0", "weak"), "posterior", {"kept": 0.96}, [0]),
        (("scratch", "0", "good"), "plain", {"last": 0.92}, [1]),
        (("scratch", "60", "good"), "rho", {"last": 1.6}, [2]),
        (("scratch", "60", "good"), "reference_loss", {"last": 1.4}, [3]),
        (("scratch", "60", "good"), "reference", {"auroc": 0.996}, [4]),
        (("frozen", "pairs", "weak"), "posterior", {"auroc": 0.94}, [4, 5]),
        (("frozen", "pairs", "one_epoch"), "posterior", {"auroc": 0.94}, [4, 6]),
        (("frozen", "60", "good"), "posterior", {"estimate": 0.53}, [7]),
        (("frozen", "pairs", "good"), "posterior", {"estimate": 0.1}, []),
        (("frozen", "20", "good"), "reference", {"last": 0.93}, [8]),
    ],
)
def test_a_criterion_fails_by_the_cell_that_breaks_it(cell, name, figures, fails):
    assert met(measured()) == ["yes"] * len(CRITERIA)
    results = measured(cell=cell, name=name, figures=figures)
    assert [place for place, word in enumerate(met(results)) if word != "yes"] == fails
    for place in fails:
        row = CRITERIA[place].row(results, results.cells)
        assert place in (2, 3) or row["worst cell"].startswith(cell[0])


def test_every_method_and_baseline_has_a_row():
    results = measured()
    criteria, overview = summary(results)
    assert len(criteria.rows) == len(CRITERIA)
    assert overview.figures("posterior", "frozen: accuracy") == pytest.approx([91.0, 91.0])
    assert overview.cells["posterior", "frozen: less plain training"] == "+1.0 (0.0)"
    written = list(tables(results))
    assert len(written) == 3 * 2 * len(CORE_REFERENCES)
    assert all(len(table.rows) == len(TITLES) for table in written[::3])


@pytest.mark.slow
def test_a_small_core_is_chosen_and_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(weak_cells, "EPOCHS", 2)
    monkeypatch.setattr(weak_cells, "REFERENCE_EPOCHS", 2)
    monkeypatch.setattr(weak_references, "LEARNING_RATES", (1e-3, 1e-2))
    monkeypatch.setattr(weak_references, "TEMPERATURES", (1.0,))
    monkeypatch.setattr(weak_references, "TRIED", (("40", "good"),))
    monkeypatch.setattr(weak_references, "CORE_NOISES", ("40",))
    monkeypatch.setattr(weak_references, "CORE_REFERENCES", ("good",))
    console = Console(quiet=True)
    chosen = STUDY.parts["core"].choose(Lab(tmp_path / "choose", "choose", [40], 1, [], console))
    assert set(chosen) == {"frozen", "scratch", "same_start"}
    lab = Lab(tmp_path / "report", "report", [50], 1, [], console)
    _, overview, *others = STUDY.parts["core"].report(lab, chosen)
    assert len(others) == 2 * 3
    assert all(overview.figures(row, "frozen: accuracy") for row in overview.rows)
    cell = make_cell("scratch", "40", "good", 50, "report")
    assert len(cell.evaluation) == 500
    assert int(cell.wrong.sum()) == 320
