"""From scores and manifests to figures and pictures: detection, membership, comparison; and pools that cannot be."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import (
    average_precision_score,
    jaccard_score,
    precision_recall_fscore_support,
    roc_auc_score,
)

from lightning_mimic.curation import (
    CurationError,
    Ensemble,
    Manifest,
    Mixture,
    Sign,
    compare,
    curate,
    detect,
    membership,
    select,
)
from lightning_mimic.curation.plots import plot_quality, plot_scores
from support.cases import for_each
from support.ledgers import write_scores


def test_detection_agrees_with_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(200, generator=generator) < 0.3
    scores = torch.randn(200, generator=generator) - wrong.float()
    found = detect(scores, scores < 0, wrong)
    precision, recall, f1, _ = precision_recall_fscore_support(wrong, scores < 0, average="binary")
    assert found.auroc == pytest.approx(roc_auc_score(wrong, -scores), abs=1e-6)
    assert found.average_precision == pytest.approx(average_precision_score(wrong, -scores), abs=1e-6)
    assert (found.precision, found.recall, found.f1) == pytest.approx((precision, recall, f1), abs=1e-6)
    assert found.share_kept == pytest.approx(float((scores >= 0).float().mean()))
    assert found.share_right == pytest.approx(float((~wrong).float().mean()))
    assert found.auroc > 0.5  # lower scores are the suspicious ones


@for_each("scale", [1e-8, 1e3])
def test_detection_does_not_depend_on_the_size_of_scores(scale):
    generator = torch.Generator().manual_seed(1)
    wrong = torch.rand(200, generator=generator) < 0.3
    scores = torch.randn(200, generator=generator) - wrong.float()
    assert detect(scale * scores, scores < 0, wrong).auroc == detect(scores, scores < 0, wrong).auroc


def test_the_picture_is_a_png(tmp_path):
    images = [torch.rand(1, 8, 8) for _ in range(3)]
    wrong = torch.tensor([True, False, False, True])
    plot_scores(tmp_path / "a.png", torch.tensor([-1.0, 0.0, 2.0, -0.5]), wrong, images, ["x", "y", "z"], "title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def scored(path, ids, scores):
    pq.write_table(pa.table({"id": ids, "keep": [True] * len(ids), "score": pa.array(scores, pa.float64())}), path)
    return Manifest(path)


@for_each("scale", [1e-8, 1.0, 1e3])
def test_membership_agrees_with_scikit_learn(scale, tmp_path):
    generator = np.random.default_rng(0)
    member = generator.random(300) < 0.3
    scores = scale * (generator.standard_normal(300) + member)
    ids = [f"n{k}" for k in generator.permutation(300)]
    made = scored(tmp_path / "a.parquet", [*ids, "none"], [*scores, None])
    found = membership(made, (i for i, m in zip(ids, member, strict=True) if m))
    assert found.ranking == tuple(ids[k] for k in np.argsort(-scores))
    guessed = np.zeros(300, bool)
    guessed[np.argsort(-scores)[: member.sum()]] = True
    assert found.auroc == pytest.approx(roc_auc_score(member, scores), abs=1e-6)
    assert found.average_precision == pytest.approx(average_precision_score(member, scores), abs=1e-6)
    assert found.jaccard == pytest.approx(jaccard_score(member, guessed), abs=1e-6)
    share = member.mean()
    assert found.chance == pytest.approx(share / (2 - share), abs=1e-12)
    drawn = [jaccard_score(member, generator.permutation(member)) for _ in range(100)]
    assert found.chance == pytest.approx(np.mean(drawn), abs=0.02)


def test_equal_scores_are_ranked_by_id(tmp_path):
    made = scored(tmp_path / "a.parquet", [4, 3, 2, 1], [0.0, 1.0, 1.0, 1.0])
    assert membership(made, [1]).ranking == (1, 2, 3, 4)
    assert membership(made, [1]).auroc == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([1, 9, 8], r"2 of the `members` have no score in .*a\.parquet, such as 8\.$"),
        ([1, 4], r"1 of the `members` have no score in .*a\.parquet, such as 4\.$"),
        (["1"], r"1 of the `members` have no score in .*a\.parquet, such as '1'\.$"),
        ([], r"^0 of 3 samples are members; there must be at least one"),
        ([1, 2, 3, 3], r"^3 of 3 samples are members; there must be at least one"),
    ],
)
def test_members_are_some_of_the_scored_samples(members, message, tmp_path):
    with pytest.raises(CurationError, match=message):
        membership(scored(tmp_path / "a.parquet", [1, 2, 3, 4], [1.0, 2.0, 3.0, None]), members)


def test_a_selection_has_no_scores_to_tell_members_by(tmp_path):
    scored(tmp_path / "a.parquet", [1, 2], [1.0, 2.0])
    made = select(f"{tmp_path}/a.parquet", tmp_path / "b.parquet")
    with pytest.raises(CurationError, match=r"b\.parquet has no column of scores; .*curated from a ledger\.$"):
        membership(made, [1])
    with pytest.raises(CurationError, match=r"b\.parquet was not made from a ledger; .*mimic-curate"):
        compare({"b": made})


def told(path, share_kept, quality=None, samples=100, kept=50):
    """A manifest that says such things of itself."""
    quality = None if quality is None else {"estimate": quality, "low": quality - 0.1, "high": quality + 0.05}
    said = {"samples": samples, "kept": kept, "share_kept": share_kept, "quality": quality}
    table = pa.table({"id": [1], "keep": [True]}).replace_schema_metadata({b"lightning_mimic": json.dumps(said)})
    pq.write_table(table, path)
    return Manifest(path)


def test_data_sets_are_ordered_by_quality_and_correlate_with_the_truth(tmp_path):
    draw = np.random.default_rng(0)
    qualities, noise = draw.uniform(0.2, 0.9, 7), draw.uniform(0, 1, 7).round(1)
    assert len(set(noise)) < 7  # ties
    made = {f"s{k}": told(tmp_path / f"{k}.parquet", 1 - q, float(q)) for k, q in enumerate(qualities)}
    found = compare(made, {f"s{k}": float(noise[k]) for k in range(7)})
    assert [each.name for each in found.datasets] == [f"s{k}" for k in np.argsort(-qualities)]
    assert found.pearson == pytest.approx(pearsonr(qualities, 1 - noise)[0], abs=1e-6)
    assert found.spearman == pytest.approx(spearmanr(qualities, 1 - noise)[0], abs=1e-6)
    best = found.datasets[0]
    q = float(qualities.max())
    assert (best.quality, best.low, best.high, best.share_kept) == (q, q - 0.1, q + 0.05, 1 - q)
    assert (best.samples, best.kept, best.right) == (100, 0.5, 1 - float(noise[qualities.argmax()]))


def test_without_everyones_quality_the_share_kept_orders(tmp_path):
    made = {
        "a": told(tmp_path / "a.parquet", 0.3, 0.9), "b": told(tmp_path / "b.parquet", 0.8),
        "c": told(tmp_path / "c.parquet", 0.5, 0.1), "d": told(tmp_path / "d.parquet", 0.5, 0.2),
    }  # fmt: skip
    found = compare(made, {"a": 0.6, "b": 0.3, "c": 0.4})
    assert [each.name for each in found.datasets] == ["b", "c", "d", "a"]
    assert found.pearson == pytest.approx(pearsonr([0.3, 0.8, 0.5], [0.4, 0.7, 0.6])[0], abs=1e-6)
    assert [each.right for each in found.datasets] == pytest.approx([0.7, 0.6, None, 0.4])


@for_each("noise", [None, {}, {"a": 0.1, "b": 0.2}, {"a": 0.1, "b": 0.1, "c": 0.1}])
def test_too_few_or_equal_truths_do_not_correlate(noise, tmp_path):
    made = {name: told(tmp_path / f"{name}.parquet", k / 4) for k, name in enumerate("abc")}
    found = compare(made, noise)
    assert (found.pearson, found.spearman) == (None, None)
    assert [each.name for each in found.datasets] == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ({"old": 0.1, "x": 0.1}, r"^`noise`: no manifest is called 'x'; "),
        ({"odl": 0.1}, r"^`noise`: no manifest is called 'odl'; nearest: 'old'\.$"),
        ({"old": 1.5}, r"^`noise` of 'old' is 1\.5; expected a share, 0 to 1\.$"),
        ({"old": -0.1}, r"^`noise` of 'old' is -0\.1; expected a share, 0 to 1\.$"),
        ({"old": float("nan")}, r"^`noise` of 'old' is nan; expected a share, 0 to 1\.$"),
    ],
)
def test_a_wrong_noise_is_refused(noise, message, tmp_path):
    with pytest.raises(CurationError, match=message):
        compare({"old": told(tmp_path / "a.parquet", 0.5)}, noise)


@pytest.mark.parametrize("quality", [None, 0.6])
def test_the_comparison_is_drawn_as_a_png(quality, tmp_path):
    made = {name: told(tmp_path / f"{name}.parquet", 0.5, quality) for name in ("a", "a long name")}
    for noise in (None, {"a": 0.3}):
        plot_quality(tmp_path / "q.png", compare(made, noise))
        assert (tmp_path / "q.png").read_bytes().startswith(b"\x89PNG")


@for_each("mark", [";", "|", "\t", "#", "'"])
def test_a_csv_is_separated_by_commas_whatever_its_ids_hold(mark, tmp_path):
    ids = [f"a{mark}1", f"{mark}b{mark}2"]
    write_scores(tmp_path / "scores", [1.0, -1.0], ids=ids)
    (tmp_path / "pool.csv").write_text("\n".join(["id", *ids, ""]))
    done = curate(tmp_path / "scores", pool=tmp_path / "pool.csv")
    assert done.manifest.table()["id"].to_pylist() == ids[::-1]


def test_names_of_directories_are_only_names(tmp_path):
    ledger = tmp_path / "run1" / "score=5.0" / "epoch=2"
    write_scores(ledger, [[1.0, -3.0], [1.0, 1.0]], ids=["a", "b"])
    rows = curate(ledger).manifest.table().select(["id", "score", "scorings"]).to_pylist()
    assert rows == [{"id": "b", "score": -1.0, "scorings": 2}, {"id": "a", "score": 1.0, "scorings": 2}]


def test_names_of_files_are_only_names(tmp_path):
    write_scores(tmp_path / "scores", [1.0, 2.0], ids=["a", "b"])
    for name, ids in (("pool1", ["a", "b", "c"]), ("pool[1]", ["a", "b", "d"])):
        pq.write_table(pa.table({"id": ids}), tmp_path / f"{name}.parquet")
    done = curate(tmp_path / "scores", pool=tmp_path / "pool[1].parquet", unscored="drop")
    assert done.manifest.table()["id"].to_pylist() == ["a", "b", "d"]


def test_a_pool_that_lacks_what_was_scored_is_refused(tmp_path):
    write_scores(tmp_path / "scores", [1.0, 2.0, 3.0])
    pq.write_table(pa.table({"id": [1, 7]}), tmp_path / "pool.parquet")
    message = rf" has scores of 2 samples that `pool` {tmp_path}/pool.parquet does not list, such as [02]\. Give the"
    with pytest.raises(CurationError, match=message):
        curate(tmp_path / "scores", pool=tmp_path / "pool.parquet", unscored="keep")


@pytest.mark.parametrize(
    ("name", "ids", "message"),
    [
        ("pool.parquet", ["0", "1"], "pool.parquet has ids that are text, and elsewhere they are whole numbers."),
        ("pool.parquet", [0, 1, None], "pool.parquet: 1 rows have no id (it is missing or empty)."),
        ("pool.csv", ["0", "1", "x"], "pool.csv: 1 rows have no id, or one that is no whole number as the others are, "
                                      "such as 'x'."),
        ("pool.csv", ["0", "1", str(2**64)], f"such as '{2**64}'."),
        ("pool.csv", ["0", "1", "2.5"], "such as '2.5'."),
        ("pool.csv", ["0", "1", "1e3"], "such as '1e3'."),
        ("pool.txt", ["0"], "pool.txt is neither Parquet nor CSV by its name (.parquet, .csv)."),
        ("none.csv", None, "none.csv is not there."),
        ("bad.parquet", None, "bad.parquet cannot be read: "),
        ("names.csv", None, "names.csv has no column 'id'; nearest: 'ids'."),
    ],
)  # fmt: skip
def test_a_pool_that_cannot_be_read_is_refused(name, ids, message, tmp_path):
    write_scores(tmp_path / "scores", [1.0, 2.0])
    if ids is not None:
        (pq.write_table if name.endswith("parquet") else pa.csv.write_csv)(pa.table({"id": ids}), tmp_path / name)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no table PAR1")
    (tmp_path / "names.csv").write_text("ids,x\n0,1\n1,2\n")
    with pytest.raises(CurationError, match=re.escape(message)):
        curate(tmp_path / "scores", None, tmp_path / "out", pool=tmp_path / name, unscored="keep")
    assert not (tmp_path / "out").exists()


def test_numbers_in_a_parquet_pool_do_not_pass_for_text(tmp_path):
    write_scores(tmp_path / "scores", [1.0], ids=["7"])
    pq.write_table(pa.table({"id": [7]}), tmp_path / "pool.parquet")
    with pytest.raises(
        CurationError, match=r"pool\.parquet has ids that are whole numbers, and elsewhere they are text"
    ):
        curate(tmp_path / "scores", pool=tmp_path / "pool.parquet")


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.6])
def test_the_truth_of_a_simulated_ledger_is_recovered(rate, tmp_path):
    random = np.random.default_rng(7)

    def ledger(name, right):
        scores = np.where(right, 1.0, -1.0) + random.standard_normal((5, len(right)))
        write_scores(tmp_path / name, scores)
        return tmp_path / name

    right = random.random(4000) >= rate
    calibration = {"trusted": ledger("t", np.ones(400, bool)), "mislabelled": ledger("f", np.zeros(400, bool))}
    data = ledger("data", right)
    # Of means of five scores 98.7 % have the right sign, of single scores 84 %, so of majorities of five 96.8 %.
    for one, best in ((Sign(), 0.987), (Mixture(), 0.987), (Ensemble([Sign(), Mixture()]), 0.968)):
        found = curate(data, one, **calibration)
        rows = found.manifest.table().sort_by("id")
        assert np.mean(rows["keep"].to_numpy(zero_copy_only=False) == right) > best - 0.01
        assert abs(found.quality.estimate - right.mean()) < 0.02  # trusted samples err by 0.006
