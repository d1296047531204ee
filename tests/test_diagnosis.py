"""A reference looked at before training: every figure from loops, every verdict by a table, the claims on digits."""

import copy
import dataclasses
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import oracles
from lightning_mimic import Diagnosis, diagnose
from lightning_mimic.data.digits import DigitsDataModule
from lightning_mimic.data.noise import SymmetricNoise
from lightning_mimic.models import ImageClassifier, SmallConvNet
from lightning_mimic.reference.diagnosis import Estimate
from support.cases import for_each
from support.diagnosed_modules import ByName, Moody, Named, Noisy, estimated, same
from support.toys import WithLosses, losses_of, parameters_of, toy, toy_data


class Attending(WithLosses):
    def forward(self, x):
        tokens = torch.tanh(self.body(x)).view(len(x), 4, 2)
        return self.head(F.scaled_dot_product_attention(tokens, tokens, tokens).flatten(1))


def cosine(own, theirs, names):
    return float(F.cosine_similarity(*(torch.cat([p[n].flatten() for n in names]) for p in (own, theirs)), dim=0))


def by_hand(module, reference, batches, names):
    """The figures, one sample, one label and one point at a time."""
    module, reference = (copy.deepcopy(m).eval().requires_grad_() for m in (module, reference))
    own, theirs = parameters_of(module), parameters_of(reference)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    gradients = oracles.per_sample_gradients(module, losses_of, (x, y))
    scores = oracles.mimic_scores(gradients, theirs, {name: own[name] for name in names})
    gaps = []
    for rows, labels in batches:
        for k in range(len(rows)):
            if labels[k] != labels[k - 1]:  # the first gets the last one's
                right, wrong = (F.cross_entropy(reference(rows[[k]]), labels[[j]]) for j in (k, k - 1))
                gaps.append((wrong - right).detach())
    losses = {}
    for t in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0):
        state = own | {name: (1 - t) * own[name] + t * theirs[name] for name in names}
        losses[t] = float(F.cross_entropy(torch.func.functional_call(module, state, (x,)), y))
    matrices = [name for name, p in own.items() if p.ndim > 1]
    outside = [name for name in matrices if name not in names] or matrices
    return Diagnosis(
        samples=len(x),
        cosines={name: cosine(own, theirs, [name]) for name in names},
        distances={name: float((theirs[name] - own[name]).norm() / own[name].norm()) for name in names},
        weight_cosine=cosine(own, theirs, outside),
        score=estimated(scores),
        label_gap=estimated(torch.stack(gaps)),
        loss=losses[0.0],
        reference_loss=float(losses_of(reference, (x, y)).detach().mean()),
        path_losses=losses,
    )


BODY, HEAD = ["body.weight", "body.bias"], ["head.weight", "head.bias"]
# module, what is scored, which these are, whether others train
LOOKED_AT = {
    "head": (WithLosses, "head", HEAD, True),
    "all": (WithLosses, "all", [*BODY, *HEAD], False),
    "a weight": (WithLosses, "head.weight", HEAD[:1], True),
    "frozen": (WithLosses, "head", HEAD, False),
    "normalisation and dropout": (Moody, ["all", "!norm"], [*BODY, *HEAD], True),
    "below attention": (Attending, "body", BODY, True),
    "held alone": (WithLosses, "head", HEAD, True),
}


@pytest.mark.parametrize("case", LOOKED_AT)
def test_every_figure_is_what_loops_give(case):
    kind, parameters, names, moves = LOOKED_AT[case]
    module, reference, batches = (
        toy(kind).requires_grad_(case != "frozen"),
        toy(kind, seed=1),
        list(DataLoader(toy_data(22), 4)),
    )
    expected = dataclasses.replace(by_hand(module, reference, batches, names), rest_trains=moves)
    assert 0 < expected.label_gap.count < 22
    if case == "held alone":
        expected = dataclasses.replace(expected, weight_cosine=None, label_gap=None, reference_loss=None)
        reference = nn.ModuleDict({"head": reference.head})
    for source in (reference, reference.state_dict()):
        same(diagnose(module, source, batches, parameters), expected)


@pytest.mark.parametrize("kind", [Moody, Noisy])
def test_nothing_is_touched(kind):
    module, reference, batches = toy(kind), toy(kind, seed=1), list(DataLoader(toy_data(12), 4))
    module.body.requires_grad_(False)
    module.norm.eval()
    reference.head.eval()
    held = [module.state_dict(), reference.state_dict(), batches]
    before, state = copy.deepcopy(held), torch.get_rng_state()
    with torch.no_grad():  # whatever the caller is in
        diagnose(module, reference, batches, "head")
    torch.testing.assert_close([*held, torch.get_rng_state()], [*before, state], rtol=0, atol=0)
    for model, still in ((module, module.norm), (reference, reference.head)):
        assert [part for part in model.modules() if not part.training] == [still]
        assert all(p.grad is None for p in model.parameters())
    assert [n for n, p in module.named_parameters() if not p.requires_grad] == BODY
    assert all(p.requires_grad for p in reference.parameters())


@for_each(("samples", "taken"), [({}, 6), ({"samples": 200}, 2), ({"samples": 999}, 8)])
def test_no_more_batches_are_taken_than_it_needs(samples, taken):
    given, batches = [], list(DataLoader(toy_data(800), 100))
    loader = (given.append(batch) or batch for batch in batches)
    module, reference = toy(WithLosses), toy(WithLosses, seed=1)
    found = diagnose(module, reference, loader, "head", **samples)
    assert (len(given), found.samples, found.score.count) == (taken, 100 * taken, 100 * taken)
    assert found.score == diagnose(module, reference, batches[:taken], "head", samples=10**6).score


@for_each("kind", ["dict", "named tuple", "tensor"])
def test_a_batch_may_be_no_tuple(kind):
    made = {"dict": dict, "named tuple": Named, "tensor": lambda x, y: torch.cat([x, y[:, None]], 1)}[kind]
    module, reference, batches = toy(ByName), toy(ByName, seed=1), list(DataLoader(toy_data(12), 4))
    expected = dataclasses.replace(by_hand(module, reference, batches[:2], HEAD), rest_trains=True)
    expected = dataclasses.replace(expected, label_gap=expected.label_gap if made is Named else None)
    taken = iter([made(x=x, y=y) for x, y in batches])
    same(diagnose(module, reference, taken, "head", samples=7), expected)
    assert len(list(taken)) == 1


@pytest.mark.parametrize("case", ["one label", "one answer"])
def test_labels_of_one_kind_say_nothing_of_the_reference_and_answers_of_one_kind_do(case):
    data, reference = toy_data(300), toy(WithLosses, seed=1)
    if case == "one label":
        data.tensors[1].fill_(1)
    else:
        reference.load_state_dict({name: 0 * p for name, p in reference.state_dict().items()})
    found = diagnose(toy(WithLosses), reference, DataLoader(data, 50), "head.weight")
    assert (found.alignable, found.label_gap is None) == ((True, True) if case == "one label" else (False, False))


def test_a_sample_with_nan_is_left_out():
    data, models = toy_data(12), (toy(WithLosses), toy(WithLosses, seed=1))
    expected = diagnose(*models, [data[:5], data[6:]], "head")
    data.tensors[0][5] = float("nan")
    found = diagnose(*models, [data[:6], data[6:]], "head")
    same(dataclasses.replace(found, samples=11, label_gap=expected.label_gap), expected)


def test_a_file_of_it_holds_plain_numbers_where_the_model_starts_from_zero():
    module = toy(WithLosses)
    nn.init.zeros_(module.head.bias)
    json.dumps(
        diagnose(module, toy(WithLosses, seed=1), list(DataLoader(toy_data(12), 4)), "head").facts(), allow_nan=False
    )


NONE = (
    "diagnose() needs the loss of every sample: give Linear a method `sample_losses(batch)` that returns one loss per "
    "sample. GradMimic looks at a reference without it, too, in the first steps."
)
STANDS = "the model stands at its reference, so there is no way between them to look at."
REFUSED = [
    ((nn.Linear(2, 2), nn.Linear(2, 2), []), NONE),
    ((toy(WithLosses), toy(WithLosses), list(DataLoader(toy_data(4), 4))), STANDS),
    ((toy(WithLosses), toy(WithLosses, seed=1), []), "`loader` gives no batches."),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=["no losses", "at its reference", "no batches"])
def test_what_cannot_be_looked_at_is_refused_in_a_sentence(given, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        diagnose(*given)


SHY = Estimate(0.1 * 3.0, 0.1, 100)  # at the threshold itself
ABOVE = Estimate(math.nextafter(SHY.mean, 1), SHY.error, 100)
STRANGE = "its weights have nothing in common with the model's (cosine {}), as after another initialisation"
LITTLE = "its weights have little in common with the model's (cosine {})"
BLIND = "it does not know the samples' labels from each other's (exchanging them raises its loss by {})"
UPHILL = "moving towards it does not lower the loss (mean mimic score {})"
BELOW = "what lies below the target is not the reference's (cosine {}) and trains; score 'all' parameters"
UNFIT = "its weights do not fit the model's: why"
TWO = [("doubtful", UPHILL.format("0.3 ± 0.1")), ("doubtful", BELOW.format("0.50"))]
FOUR = [("unrelated", text) for text in (UNFIT, STRANGE.format("0.10"), BLIND.format("0.3 ± 0.1"))] + TWO[:1]
# fields, findings, whether aligning it can help
TABLE = [
    ({"mismatch": "why"}, [("unrelated", UNFIT)], True),
    ({"weight_cosine": math.nextafter(0.2, 0)}, [("unrelated", STRANGE.format("0.20"))], True),
    ({"weight_cosine": 0.2}, [("doubtful", LITTLE.format("0.20"))], True),
    ({"weight_cosine": -0.3}, [("unrelated", STRANGE.format("-0.30"))], True),
    ({"weight_cosine": math.nextafter(0.4, 0), "rest_trains": True}, [("doubtful", LITTLE.format("0.40"))], True),
    ({"weight_cosine": 0.4, "rest_trains": True}, [("doubtful", BELOW.format("0.40"))], True),
    ({"weight_cosine": math.nextafter(0.9, 0), "rest_trains": True}, [("doubtful", BELOW.format("0.90"))], True),
    ({"weight_cosine": 0.9, "rest_trains": True}, [], True),
    ({"score": SHY}, [("doubtful", UPHILL.format("0.3 ± 0.1"))], True),
    ({"score": ABOVE, "label_gap": ABOVE}, [], True),
    ({"score": Estimate(-5.0, 0.1, 99), "label_gap": Estimate(-0.01, 0.005, 99)}, [], True),
    ({"score": Estimate(0.0, 0.0, 100)}, [("doubtful", UPHILL.format("0 ± 0"))], True),
    ({"label_gap": SHY}, [("unrelated", BLIND.format("0.3 ± 0.1"))], False),
    ({"mismatch": "why", "weight_cosine": 0.1, "label_gap": SHY, "score": SHY}, FOUR, False),
    ({"weight_cosine": 0.5, "rest_trains": True, "score": SHY}, TWO, True),
]


@for_each("row", range(len(TABLE)))
def test_the_verdict_follows_from_the_figures(row):
    fields, findings, alignable = TABLE[row]
    found = Diagnosis(samples=512, path_losses={0.0: 1.0, 0.25: 0.5}, **fields)
    verdict = findings[0][0] if findings else "compatible"
    assert (found.findings, found.verdict, found.alignable) == (findings, verdict, alignable)
    facts = json.loads(json.dumps(found.facts(), allow_nan=False))
    assert facts == found.facts()
    expected = (verdict, [reason for _, reason in findings], {"0.0": 1.0, "0.25": 0.5})
    assert (facts.pop("verdict"), facts.pop("findings"), facts.pop("path_losses")) == expected
    estimates = {name: facts[name] and Estimate(**facts[name]) for name in ("score", "label_gap")}
    assert dataclasses.replace(Diagnosis(**(facts | estimates)), path_losses=found.path_losses) == found


def test_it_reads_as_a_sentence():
    found = Diagnosis(
        512, weight_cosine=0.95, score=Estimate(0.12345, 0.00678, 512), loss=2.3456, reference_loss=0.12345
    )
    facts = "cosine to the model 0.95; mean mimic score 0.123 ± 0.0068; its loss 0.123; the model's 2.35"
    assert str(found) == f"the reference is compatible (512 samples; {facts})"
    two = f"{BLIND.format('0.3 ± 0.1')}; {LITTLE.format('0.25')}"
    found = Diagnosis(100, weight_cosine=0.25, label_gap=SHY)
    assert str(found) == f"the reference is unrelated: {two} (100 samples; cosine to the model 0.25)"


def classifier(seed=0, width=8):
    return toy(lambda: ImageClassifier(SmallConvNet(width=width), 10, (1, 8, 8)), seed, torch.float32)


@pytest.fixture(scope="module")
def digits():
    data, found = DigitsDataModule(train="noisy", noise=SymmetricNoise(0.4, seed=0)), {}
    data.setup()
    images, labels = data.images(data.rows["trusted"]), data.sources["train"].labels[data.rows["trusted"]]
    for name, seed, width, by in (("related", 0, 8, 0), ("other", 1, 8, 0), ("wide", 0, 9, 0), ("shuffled", 0, 8, 1)):
        net = found[name] = classifier(seed, width)
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        for _ in range(60):
            optimizer.zero_grad()
            net.sample_losses((images, labels.roll(by))).mean().backward()
            optimizer.step()
    found["noise"] = classifier()
    for p, noise in zip(found["noise"].parameters(), classifier(2).parameters(), strict=True):
        p.data.add_(noise.data)
    return list(data.train_dataloader()), found


WRONG = {"doubtful", "unrelated"}
CLAIMS = {
    "shared frozen backbone": ("related", "head", {"compatible"}),
    "shared start": ("related", "all", {"compatible"}),
    "other start": ("other", "all", {"unrelated"}),
    "other start, head": ("other", "head", {"unrelated"}),
    "noise": ("noise", "all", WRONG),
    "shuffled labels": ("shuffled", "all", WRONG),
    "other width": ("wide", "all", {"unrelated"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CLAIMS)
def test_the_verdict_on_digits(case, digits):
    (name, parameters, verdicts), (batches, references), module = CLAIMS[case], digits, classifier()
    if "frozen" in case:
        module.backbone.load_state_dict(references[name].backbone.state_dict())
        module.backbone.requires_grad_(False)
    found = diagnose(module, references[name], batches, parameters)
    assert found.verdict in verdicts, str(found)
    assert (found.samples, found.mismatch is None) == ((0, False) if name == "wide" else (512, True))
