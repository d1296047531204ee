"""Weights and ledgers by the probability that pairs match, in the engine; a reference that knows which ones do."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_mimic import Aligned, GradMimic, Ledger, MimicError, Reweighter
from lightning_mimic.reference.pair_calibration import MIN_PAIRS, RunningPairCalibration
from lightning_mimic.scorers import Posterior, ReferencePart
from support.clips import BARE, LENGTH, WORDS, clip, pairs, towers
from support.ranks import on_two_ranks
from support.toys import loader, trainer

COUNT, ROWS, KNOWN = 640, 32, 12
LESS = "the mimic scores say less than the reference does"


class Knows(nn.Module):
    """A reference that reads from an image's first pixels what its caption means."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.meanings = nn.Parameter(torch.randn(LENGTH, WORDS, KNOWN, generator=generator).double())

    def encode_image(self, images, normalize=False):
        return images[:, 0, 0, :KNOWN]

    def encode_text(self, texts, normalize=False):
        return self.meanings[torch.arange(LENGTH), texts].sum(1) / LENGTH**0.5


def matching(wrong_share=0.4, seed=0):
    """Pairs, and which of them do not match."""
    images, texts = pairs(COUNT, seed).tensors
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(COUNT, generator=generator) < wrong_share
    with torch.no_grad():
        meant = Knows().encode_text(texts)
    images[:, 0, 0, :KNOWN] = meant + 0.3 * torch.randn(COUNT, KNOWN, generator=generator).double()
    images[wrong] = images[wrong].roll(1, 0)
    return images, texts, wrong


def scored(images, texts, folder, reference=None, batches=None, state=None, **settings):
    """A pass of a model that does not change; returns the ledger's rows and the state of the run."""
    settings = {"weighting": Posterior(), "diagnose_reference": False} | settings
    model = clip()
    batches = [slice(place, place + ROWS) for place in range(0, len(images), ROWS)] if batches is None else batches
    with warnings.catch_warnings():
        if settings["weighting"] is None:
            warnings.filterwarnings("ignore", message=LESS)
        warnings.filterwarnings("ignore", message=".*never aligned")
        warnings.filterwarnings("ignore", message=".*held NaN")
        with Reweighter(model, reference or Aligned(Knows()), BARE, ledger=folder, **settings) as reweighter:
            if state is not None:
                reweighter.load_state_dict(state)
            for own in batches:
                ids = torch.arange(COUNT)[own]
                with reweighter.step((images[own], texts[own]), ids=ids, epoch=0) as step:
                    losses = model.sample_losses(step.batch)  # of all ranks' pairs
                    step.backward(losses.mean() * (len(losses) // len(ids)))
            state = reweighter.state_dict()
    return Ledger(folder).table().to_pandas().sort_values("id"), state


def expected_posteriors(images, texts):
    """Of every batch by those before it and itself."""
    calibration, found, reference = RunningPairCalibration(), [], Knows()
    for place in range(0, COUNT, ROWS):
        own = slice(place, place + ROWS)
        with torch.no_grad():
            both = F.normalize(reference.encode_image(images[own])), F.normalize(reference.encode_text(texts[own]))
        calibration.update(*both)
        found.append(calibration.posteriors(*both))
    return torch.cat(found), calibration.calibration()


def test_weights_are_in_proportion_to_the_posteriors_of_the_references_similarities(tmp_path):
    images, texts, wrong = matching()
    rows, _ = scored(images, texts, tmp_path)
    expected, calibration = expected_posteriors(images, texts)
    found = torch.tensor(rows["posterior"].to_numpy())
    torch.testing.assert_close(found, expected, equal_nan=True)
    known = ~torch.isnan(found)
    assert known.nonzero().min() == MIN_PAIRS  # old pairs have lost a little of their weight
    assert ((found < 0.5) == wrong)[known].float().mean() > 0.95
    weights = torch.tensor(rows["weight"].to_numpy()).view(-1, ROWS)
    shares = torch.where(known, found, 1).view(-1, ROWS)
    torch.testing.assert_close(weights, shares / shares.sum(1, keepdim=True))
    facts = Ledger(tmp_path).meta["attempts"][-1]["calibration"]
    assert facts | {"aligned_separation": 0} == calibration.facts() | {"aligned_separation": 0}
    assert abs(facts["wrong_share"] - float(wrong.float().mean())) < 0.06
    assert facts["aligned_separation"] < 0.6  # 16 features of a random tower hold little of twelve pixels


@pytest.mark.parametrize("cache", [False, True])
def test_a_resumed_run_has_the_same_posteriors(cache, tmp_path):
    images, texts, _ = matching()
    whole, _ = scored(images, texts, tmp_path / "whole")
    halves = [slice(place, place + ROWS) for place in range(0, COUNT, ROWS)]
    _, state = scored(images, texts, tmp_path / "halves", Aligned(Knows(), cache=cache), halves[:10])
    rows, _ = scored(images, texts, tmp_path / "halves", Aligned(Knows(), cache=cache), halves[10:], state)
    for column in ("posterior", "weight", "score"):
        torch.testing.assert_close(
            torch.tensor(rows[column].to_numpy()), torch.tensor(whole[column].to_numpy()), equal_nan=True
        )


def test_clean_pairs_have_equal_weights(tmp_path):
    images, texts, _ = matching(0.0)
    rows, _ = scored(images, texts, tmp_path)
    assert rows["posterior"].min() > 0.5
    assert (rows["weight"] * ROWS).min() > 0.9


def test_a_reference_of_random_weights_gives_uniform_weights(tmp_path):
    images, texts, _ = matching()
    rows, _ = scored(images, texts, tmp_path, Aligned(towers(seed=9)))
    assert (rows["posterior"].dropna() == 1).all()
    assert rows["weight"].to_numpy() == pytest.approx(1 / ROWS)


def test_a_broken_image_has_no_posterior_and_no_weight(tmp_path):
    images, texts, _ = matching()
    images[600, 2, 3, 4] = torch.nan
    rows, _ = scored(images, texts, tmp_path)
    assert rows["posterior"].isna().to_numpy().nonzero()[0].tolist() == [*range(MIN_PAIRS), 600]
    assert rows["weight"][rows["id"] == 600].tolist() == [0.0]


def test_without_need_there_are_no_posteriors_but_the_share(tmp_path):
    images, texts, _ = matching()
    rows, _ = scored(images, texts, tmp_path, Aligned(Knows(), every=1), weighting=None)
    assert rows["posterior"].isna().all()
    assert abs(Ledger(tmp_path).meta["attempts"][-1]["calibration"]["wrong_share"] - 0.4) < 0.06


def test_an_alignment_that_says_less_than_the_reference_is_warned_of():
    images, texts, _ = matching()
    data = torch.utils.data.TensorDataset(images, texts)
    callback = GradMimic(Aligned(Knows(), every=1), BARE, diagnose_reference=False)
    with pytest.warns(UserWarning, match=rf"{LESS}: .*0\.7\d, .*0\.[45]\d\. .*weighting=Posterior\(\)"):
        trainer(callback).fit(clip(), loader(data, ROWS))
    callback = GradMimic(Aligned(Knows()), BARE, weighting=Posterior(), diagnose_reference=False)
    trainer(callback).fit(clip(), loader(data, ROWS))  # weighs as it should


@pytest.mark.parametrize(("weighting", "verdict"), [(None, "doubtful"), (Posterior(), "compatible")])
def test_the_verdict_on_scores_by_such_an_alignment_is_doubtful(weighting, verdict, tmp_path):
    images, texts, _ = matching(0.2)
    reference = clip()
    reference.towers = Knows()
    reference.towers.logit_scale = nn.Parameter(torch.tensor(2.0).double())
    aligned = Aligned(reference, every=1)
    rows, _ = scored(images, texts, tmp_path, aligned, weighting=weighting, diagnose_reference=True)
    diagnosis = Ledger(tmp_path).meta["attempts"][-1]["diagnosis"]
    assert diagnosis["verdict"] == verdict
    assert len(rows) == COUNT
    assert [LESS in finding for finding in diagnosis["findings"]] == [True] * (verdict == "doubtful")


NOT_ALIGNED = "pass lightning_mimic.Aligned(reference), with `rotate=False` if the reference"


@pytest.mark.parametrize(
    ("reference", "settings", "message"),
    {
        "as it is": (towers(seed=1), {"weighting": Posterior()}, NOT_ALIGNED),
        "aligned if doubtful": (towers(seed=1), {"weighting": Posterior(), "on_doubtful": "align"}, NOT_ALIGNED),
        "of a last layer": (Aligned(Knows()), {"scorer": ReferencePart()}, "the scorer needs one nn.Linear"),
    }.values(),
)
def test_what_is_not_known_of_pairs_is_refused(reference, settings, message):
    with pytest.raises(MimicError, match=re.escape(message)):
        Reweighter(clip(), reference, BARE, **settings)


def rank_scores(rank, folder):
    images, texts, _ = matching()
    parts = [slice(place + rank * ROWS // 2, place + (rank + 1) * ROWS // 2) for place in range(0, COUNT, ROWS)]
    scored(images, texts, folder / "both", batches=parts)


@pytest.mark.slow
def test_two_ranks_have_the_posteriors_and_weights_of_one(tmp_path):
    images, texts, _ = matching()
    expected, _ = scored(images, texts, tmp_path / "one")
    on_two_ranks(rank_scores, tmp_path)
    rows = Ledger(tmp_path / "both").table().to_pandas().sort_values("id")
    for column in ("posterior", "weight"):
        torch.testing.assert_close(
            torch.tensor(rows[column].to_numpy()), torch.tensor(expected[column].to_numpy()), equal_nan=True
        )
