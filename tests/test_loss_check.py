"""When a loss is shown to be a plain mean, when it is asserted, and what is looked at in the steps between."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import oracles
from lightning_mimic import GradMimic, Ledger, MimicError, Reweighter, token_losses
from lightning_mimic.gradients.plain_mean import between, unequal_targets
from support.cases import for_each
from support.losses import CLASSES as CLASSES_OF_LOSSES
from support.losses import Net, alone, batch_of, net
from support.toys import CLASSES, FEATURES, HIDDEN, Toy, WithLosses, loader, parameters_of, toy, toy_data, trainer

CLOSE = {"rtol": 1e-6, "atol": 1e-9}


def fit(
    kind: type[Toy], data: Any, folder: Any = None, parameters: str = "head", epochs: int = 1, **options: Any
) -> Toy:
    module = toy(kind)
    callback = GradMimic(parameters_of(toy(kind, seed=1)), parameters, ledger=folder, **options)
    trainer(callback, epochs=epochs).fit(module, data)
    return module


def scores_of_one_step(loss, batch, parameters="head", **options):
    module, reference = net(Net, loss), dict(net(Net, loss, seed=1).named_parameters())
    with (
        Reweighter(module, reference, parameters, diagnose_reference=False, **options) as reweighter,
        reweighter.step(batch) as step,
    ):
        return step.backward(module.loss(step.batch)).scores


def right(loss, batch):
    module, reference = net(Net, loss), dict(net(Net, loss, seed=1).named_parameters())
    head = {name: p for name, p in module.named_parameters() if name.startswith("head")}
    return oracles.mimic_scores(alone(module, batch), reference, head)


# What is said of it


@pytest.mark.parametrize(
    ("kind", "options", "basis"),
    [(Toy, {}, "shown"), (Toy, {"loss": "mean"}, "asserted"), (WithLosses, {}, "sample_losses")],
)
def test_the_ledger_holds_why_the_loss_was_taken_for_a_mean(kind, options, basis, tmp_path):
    fit(kind, loader(toy_data(8)), tmp_path / "s", **options)
    assert Ledger(tmp_path / "s").meta["attempts"][0]["loss"] == basis


def test_an_asserted_mean_is_scored_as_one():
    class Custom(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return Plain.apply(F.cross_entropy(self(batch[0]), batch[1]))

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    plain, asserted = fit(Toy, loader(toy_data(8))), fit(Custom, loader(toy_data(8)), loss="mean")
    torch.testing.assert_close(parameters_of(asserted), parameters_of(plain), rtol=0, atol=0)
    with pytest.raises(MimicError, match="the gradients of `Plain` are made by code of its own"):
        fit(Custom, loader(toy_data(8)))


def test_an_assertion_of_something_else_is_refused():
    with pytest.raises(MimicError, match="`loss` is 'sum'; expected 'mean', or nothing"):
        GradMimic({}, "head", loss="sum")


# Between the steps that are followed


class SumsLater(Toy):
    at = 1

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        losses = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
        return losses.sum() if batch_idx == self.at else losses.mean()


class SumsInTheLast(SumsLater):
    at = 2


class CountsInTheFirst(Toy):
    """Divides by the size of the first batch, always."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="sum") / 4


class SumsInTheSecondEpoch(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="sum" if self.current_epoch else "mean")


@pytest.mark.parametrize("parameters", ["head", "all"])
@pytest.mark.parametrize(
    ("kind", "samples", "message"),
    [
        (SumsLater, 8, "computed by other operations than those that were followed"),
        (SumsInTheLast, 11, "it is a sum over the batch that is not divided by the number of samples"),
        (CountsInTheFirst, 11, "it is a sum over the batch that is not divided by the number of samples"),
        (SumsInTheSecondEpoch, 8, "it is a sum over the batch that is not divided by the number of samples"),
    ],
)
def test_a_loss_that_becomes_something_else_stops_training(kind, samples, message, parameters):
    with pytest.raises(MimicError, match=message):
        fit(kind, loader(toy_data(samples)), parameters=parameters, epochs=2)


def test_a_divisor_that_is_the_batch_s_size_by_chance_is_seen_when_it_is_not():
    class Counted(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self(batch[0]), batch[1], reduction="sum") / (4 + batch_idx)

    with pytest.raises(MimicError, match="computed by other operations than those that were followed"):
        fit(Counted, loader(toy_data(8)))


@pytest.mark.parametrize("parameters", ["head", "all"])
def test_other_sizes_and_other_factors_go_on(parameters, tmp_path):
    class Annealed(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            logits = self(batch[0])
            summed = F.cross_entropy(logits, batch[1], reduction="sum") / len(logits)
            return summed + 0.05 * (1 + batch_idx) * logits.square().mean()  # 1 / (5 * 4) in the first batch

    fit(Annealed, loader(toy_data(11)), tmp_path / "s", parameters, epochs=2)
    assert Ledger(tmp_path / "s").table().num_rows == 22


def test_a_batch_of_one_sample_has_nothing_to_mix(tmp_path):
    with pytest.warns(UserWarning, match="a micro-batch held a single sample"):
        fit(Toy, loader(toy_data(5), batch_size=4), tmp_path / "s")
    assert Ledger(tmp_path / "s").table()["score"].null_count == 0


# Targets that do not count


class Language(Toy):
    """Next tokens of sequences, as language models have them: shifted, and padded with -100."""

    def lengths(self, batch: Any) -> Tensor:
        return 5 + 0 * batch[1]

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Embedding(CLASSES, HIDDEN)

    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        tokens = (batch[0][:, :5].abs() * 10).long() % CLASSES
        kept = self.lengths(batch)[:, None] > torch.arange(5)
        labels = F.pad(torch.where(kept, tokens, -100), (0, 1), value=-100)[:, 1:]
        return self.head(torch.tanh(self.body(tokens))), labels

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits, labels = self.logits(batch)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class PaddedLanguage(Language):
    def lengths(self, batch: Any) -> Tensor:
        return 3 + batch[1]


class PerSequence(PaddedLanguage):
    def sample_losses(self, batch: Any) -> Tensor:
        return token_losses(*self.logits(batch))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.sample_losses(batch).mean()


def sequence_scores(kind: type[Language], data: Any) -> Tensor:
    """Each sequence alone, over its own targets."""
    module, reference = toy(kind), parameters_of(toy(kind, seed=1))
    logits, labels = module.logits(data[:])
    rows = []
    for row, own in zip(logits, labels, strict=True):
        loss = F.cross_entropy(row, own)
        rows.append(torch.autograd.grad(loss, [*module.head.parameters()], retain_graph=True))
    gradients = {f"head.{n}": torch.stack([row[i] for row in rows]) for i, n in enumerate(("weight", "bias"))}
    return oracles.mimic_scores(gradients, reference, {n: module.get_parameter(n) for n in gradients})


@pytest.mark.parametrize("kind", [Language, PerSequence])
def test_equal_numbers_of_targets_are_a_plain_mean_and_unequal_ones_have_losses_of_their_own(kind, tmp_path):
    data = toy_data(4)
    fit(kind, loader(data), tmp_path / "s")
    scores = torch.tensor(Ledger(tmp_path / "s").table()["score"].to_pylist())
    torch.testing.assert_close(scores, sequence_scores(kind, data).float())


def test_unequal_numbers_of_targets_are_refused_with_the_lines_that_make_it_exact():
    with pytest.raises(MimicError, match=r"(?s)different numbers of them \(ignore_index\).*token_losses\(logits"):
        fit(PaddedLanguage, loader(toy_data(4)))


@pytest.mark.parametrize("dim", [0, 1])
def test_targets_are_counted_for_each_sample_in_whatever_order_they_lie(dim):
    def loss(logits, batch):
        logits, targets = torch.stack([logits] * 3, dim), torch.stack([batch["y"], batch["z"], batch["y"]], dim)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=0)

    batch = batch_of(4)
    batch["y"], batch["z"] = torch.tensor([0, 0, 0, 0]), torch.tensor([1, 2, 3, 4])
    torch.testing.assert_close(scores_of_one_step(loss, batch), right(loss, batch), **CLOSE)
    batch["y"] = torch.tensor([1, 0, 0, 0])
    with pytest.raises(MimicError, match="samples have different numbers of them"):
        scores_of_one_step(loss, batch)


@for_each(("ignored", "unequal"), [(-100, False), (3, True), (1, True)])
def test_targets_that_do_not_count_are_counted_for_each_sample(ignored, unequal):
    layer, targets = nn.Linear(4, 4), torch.tensor([1, 3, 1])
    for reduction, counted in (("mean", unequal), ("sum", False)):
        logits = layer(torch.randn(3, 4))
        loss = F.cross_entropy(logits, targets, ignore_index=ignored, reduction=reduction)
        assert bool(unequal_targets(between(loss.grad_fn, logits.grad_fn), 3)) is counted


@pytest.mark.parametrize("order", [1, -1])
def test_each_of_several_losses_is_looked_at(order):
    logits, targets = nn.Linear(4, 4)(torch.randn(3, 4)), torch.tensor([1, 3, 1])
    some, others = (F.cross_entropy(logits, targets, ignore_index=ignored) for ignored in (3, -100)[::order])
    assert bool(unequal_targets(between((some + others).grad_fn, logits.grad_fn), 3))


@pytest.mark.parametrize("rows", [257, 512])
@for_each("ignored", [-100, 2])
def test_targets_are_counted_in_half_precision_too(rows, ignored):
    targets = torch.zeros(rows, dtype=torch.int64)
    for left_out in (0, 1):
        targets[:left_out] = ignored
        logits = nn.Linear(4, 4)(torch.randn(rows, 4)).to(torch.bfloat16)
        loss = F.cross_entropy(logits, targets, ignore_index=ignored)
        assert bool(unequal_targets(between(loss.grad_fn, logits.grad_fn), rows)) is bool(left_out)


def test_a_loss_below_the_scored_rows_is_not_looked_at():
    class Scaled(Toy):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.body(x))
            return self.head(hidden * F.mse_loss(hidden, torch.zeros_like(hidden), reduction="sum"))

    fit(Scaled, loader(toy_data(8)), reweight="target")


# What the axes mean


class TimeFirst(Toy):
    """Time steps on the first axis of the head's output, as many as samples; its targets lie the same way."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(1, HIDDEN)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        steps = batch[0].T[..., None]  # (T, B, 1)
        targets = batch[1].expand(FEATURES, -1)
        return F.cross_entropy(self.head(torch.tanh(self.body(steps))).flatten(0, 1), targets.flatten())


class TimeFirstRecurrent(TimeFirst):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LSTM(1, HIDDEN)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.head(self.body(batch[0].T[..., None])[0])
        return F.cross_entropy(logits.flatten(0, 1), batch[1].expand(FEATURES, -1).flatten())


@pytest.mark.parametrize("kind", [TimeFirst, TimeFirstRecurrent])
@pytest.mark.parametrize("size", [FEATURES, 4])
def test_time_steps_are_not_taken_for_samples(kind, size):
    with pytest.raises(MimicError, match=r"one row for each of 4 samples|samples"):
        fit(kind, loader(toy_data(12), batch_size=size))


class TimeFirstAlone(TimeFirst):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.head(torch.tanh(self.body(batch[0].T[..., None]))).square().mean()


def test_without_targets_the_inputs_show_where_the_samples_lie():
    with pytest.raises(MimicError, match="the samples do not lie on the first axis of the scored rows"):
        fit(TimeFirstAlone, loader(toy_data(12), batch_size=FEATURES))


class TimeFirstBelowANorm(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(1, HIDDEN)
        self.norm = nn.BatchNorm1d(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.body(x.T[..., None]).mean(0))))


def test_time_steps_below_a_norm_over_the_batch_are_not_taken_for_samples():
    with pytest.raises(MimicError, match=r"output of 'body' has shape \(6, 6, 8\), and its first axis is not that of"):
        fit(TimeFirstBelowANorm, loader(toy_data(12), batch_size=FEATURES), parameters="all")


class Shuffled(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        order = torch.randperm(len(batch[0]))
        return F.cross_entropy(self(batch[0][order]), batch[1][order])


class Flipped(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0].flip(0)), batch[1].flip(0))


@pytest.mark.parametrize("parameters", ["head", "all"])
@pytest.mark.parametrize("kind", [Shuffled, Flipped])
def test_samples_in_another_order_are_not_taken_for_those_of_the_batch(kind, parameters):
    with pytest.raises(MimicError, match="row i of the batch must be sample i throughout the step"):
        fit(kind, loader(toy_data(8)), parameters=parameters)


class Mixup(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        order, (x, y) = torch.randperm(len(batch[0])), (batch[0].clone(), batch[1])
        mixed = 0.3 * x + 0.7 * x[order]
        x[:, 2:] = x[order, 2:]
        logits = self(0.5 * (x + mixed))
        return 0.3 * F.cross_entropy(logits, y) + 0.7 * F.cross_entropy(logits, y[order])


def test_what_is_mixed_with_others_is_still_its_own():
    fit(Mixup, loader(toy_data(8)))


def test_a_row_is_not_taken_for_a_column_when_a_batch_is_as_long():
    def written(p: Tensor, b: dict[str, Tensor]) -> Tensor:
        factors = torch.zeros(len(p), CLASSES_OF_LOSSES).double()
        factors[torch.arange(len(p))] = b["w"]
        return (p * factors).mean()

    with pytest.raises(MimicError, match="not shown to be a plain mean over samples"):
        scores_of_one_step(written, batch_of(CLASSES_OF_LOSSES))


class ByFrequency(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Embedding(CLASSES, HIDDEN, scale_grad_by_freq=True)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        words = (batch[0].abs() * 10).long() % CLASSES
        return F.cross_entropy(self.head(torch.tanh(self.body(words).mean(1))), batch[1])


def test_an_embedding_whose_gradient_depends_on_the_whole_batch_is_refused():
    with pytest.raises(MimicError, match="scale_grad_by_freq"):
        fit(ByFrequency, loader(toy_data(8)), parameters="body")


def test_a_hook_that_may_change_the_gradient_is_refused():
    def hooked(p: Tensor, b: dict[str, Tensor]) -> Tensor:
        p.register_hook(lambda gradient: gradient / gradient.norm())
        return F.cross_entropy(p, b["y"])

    with pytest.raises(MimicError, match="a hook on a tensor"):
        scores_of_one_step(hooked, batch_of(4))


def test_two_tasks_in_a_batch_of_two_are_not_taken_for_samples():
    def tasks(logits, batch):
        return torch.stack([F.cross_entropy(logits, batch["y"]), F.mse_loss(logits, batch["real"])]).mean()

    batch = batch_of(2)
    for parameters in ("head", ["head.weight", "head.bias"]):
        torch.testing.assert_close(scores_of_one_step(tasks, batch, parameters), right(tasks, batch), **CLOSE)


# What a loss may be made of


def test_a_tensor_that_is_not_of_the_batch_must_not_tell_samples_apart():
    factors = torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    with pytest.raises(MimicError, match="a tensor that is not part of the batch has a value for each of its samples"):
        scores_of_one_step(lambda p, b: (F.cross_entropy(p, b["y"], reduction="none") * factors).mean(), batch_of(4))


@for_each(
    "noise",
    [
        lambda p: torch.rand(len(p), 1).double(),
        lambda p: torch.rand_like(p),
        lambda p: torch.ones(len(p), 1).double(),
        lambda p: F.dropout(torch.ones_like(p), 0.5),
        lambda p: torch.zeros(len(p), 1).double().uniform_(),
        lambda p: torch.linspace(0, 1, 10).double()[torch.randint(10, (len(p),))][:, None],
        lambda p: torch.linspace(0, 1, CLASSES_OF_LOSSES).double().expand(len(p), -1),
        lambda p: 2 * torch.linspace(0, 1, CLASSES_OF_LOSSES).double().expand_as(p).square() + 1,
        lambda p: -torch.distributions.Normal(torch.linspace(0, 1, CLASSES_OF_LOSSES), 1.0).log_prob(p).detach(),
    ],
)
def test_noise_and_constants_for_each_sample_are_its_own(noise):
    def noisy(logits, batch):
        torch.manual_seed(len(logits))
        return F.mse_loss(logits * (1 + noise(logits)), batch["real"])

    assert scores_of_one_step(noisy, batch_of(4)).isfinite().all()


@for_each(
    "read",
    [
        lambda b: b["w"].sum().item(),
        lambda b: float(b["w"].sum()),
        lambda b: sum(b["w"].tolist()),
        lambda b: b["w"].numpy().sum().item(),
        lambda b: int(b["mask"].sum()),
        lambda b: b["mask"].sum().__index__(),
    ],
)
def test_a_number_that_was_read_from_the_batch_is_no_constant(read):
    for loss in (
        lambda p, b: F.mse_loss(p, b["real"]) / read(b),
        lambda p, b: F.mse_loss(p, b["real"] * read(b)),
        lambda p, b: F.mse_loss(p, b["real"]) * torch.tensor(read(b)),
        lambda p, b: F.mse_loss(p, b["real"]) * torch.full((), read(b)),
    ):
        with pytest.raises(MimicError, match="a number was read from the batch by"):
            scores_of_one_step(loss, batch_of(4))


@for_each(
    "loss",
    [
        lambda p, b: F.mse_loss(p, b["real"]) * torch.full((), b["w"].sum()),
        lambda p, b: F.mse_loss(p, b["real"] * torch.zeros(()).fill_(b["w"].sum())),
        lambda p, b: F.mse_loss(p, b["real"] * torch.tensor([*b["w"].sum()[None]])),
        lambda p, b: F.mse_loss(p[:, b["y"].max()], b["real"][:, 0]),
        lambda p, b: F.mse_loss(p[:, : int(b["y"].max())].sum(1), b["real"][:, 0]),
        lambda p, b: F.huber_loss(p, b["real"], delta=float(b["w"].sum())),
        lambda p, b: F.mse_loss(p, torch.normal(b["w"].mean().expand(5), 1.0).expand_as(p)),
        lambda p, b: (F.mse_loss(p, b["real"], reduction="none") * b["w"][:, None].data.div_(b["w"].sum())).mean(),
        lambda p, b: (F.one_hot(b["y"]) * p[:, : F.one_hot(b["y"]).shape[1]]).mean(),
    ],
)
def test_other_ways_for_the_batch_s_numbers_into_the_loss_are_seen(loss):
    with pytest.raises(MimicError, match="not shown to be a plain mean over samples"):
        scores_of_one_step(loss, batch_of(4))


def test_reading_what_does_not_enter_the_loss_is_no_obstacle():
    def logged(logits, batch):
        loss = F.mse_loss(logits, batch["real"])
        loss.item(), logits.detach().argmax(1).tolist()
        return loss if bool((batch["w"] > 0).all()) else loss.sqrt()

    batch = batch_of(4)
    torch.testing.assert_close(scores_of_one_step(logged, batch), right(logged, batch), **CLOSE)


@for_each(
    "loss",
    [
        lambda p, b: F.mse_loss(p.clone().mul_(2), b["real"]),
        lambda p, b: F.mse_loss(p.clone().masked_fill_(b["mask"], 0), b["real"]),
        lambda p, b: F.mse_loss(torch.empty_like(p).copy_(p), b["real"]),
        lambda p, b: F.mse_loss(p, b["real"].clone().index_put_((b["mask"],), torch.zeros(()).double())),
    ],
)
def test_changes_in_place_that_treat_samples_apart(loss):
    batch = batch_of(4)
    torch.testing.assert_close(scores_of_one_step(loss, batch), right(loss, batch), **CLOSE)


def first_row_zeroed(logits, batch):
    logits = logits.clone()
    logits[0] = 0
    return F.mse_loss(logits, batch["real"])


def shared_memory(logits, batch):
    weights = batch["w"].clone()
    alias = weights.view(-1)
    alias /= weights.sum()
    return (F.cross_entropy(logits, batch["y"], reduction="none") * weights).mean()


def test_an_operation_of_another_library_is_not_taken_for_torch_s():
    @torch.library.custom_op("lightning_mimic_tests::tanh", mutates_args=())
    def tanh(x: Tensor) -> Tensor:
        return torch.tanh(x) / x.std()

    tanh.register_autograd(lambda ctx, gradient: gradient)
    with pytest.raises(MimicError, match="how the operation `lightning_mimic_tests::tanh` treats the samples"):
        scores_of_one_step(lambda p, b: F.mse_loss(tanh(p), b["real"]), batch_of(4))


@for_each("loss", [first_row_zeroed, shared_memory])
def test_changes_in_place_that_do_not(loss):
    with pytest.raises(MimicError, match="not shown to be a plain mean over samples"):
        scores_of_one_step(loss, batch_of(4))


def test_two_models_may_take_steps_in_any_order():
    def loss(p, b):
        return F.mse_loss(p, b["real"])

    batch, one, other = batch_of(4), net(Net, loss), net(Net, loss, seed=2)
    reference = dict(net(Net, loss, seed=1).named_parameters())
    engines = [Reweighter(each, reference, "head", diagnose_reference=False) for each in (one, other)]
    first, second = (engine.step(batch) for engine in engines)
    step_one, step_two = first.__enter__(), second.__enter__()
    results = [step.backward(module.loss(step.batch)).scores for step, module in ((step_one, one), (step_two, other))]
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    for engine in engines:
        engine.close()
    torch.testing.assert_close(results[0], right(loss, batch), **CLOSE)
    assert not torch.equal(*results)


class Slots:
    """Keeps a tensor of the batch in a slot."""

    __slots__ = ("w",)

    def __init__(self, w: Tensor) -> None:
        self.w = w


class Held:
    """A part of a batch that is of a class of its own."""

    def __init__(self, w: Tensor) -> None:
        self.below = Slots(w)


def test_tensors_in_a_batch_of_any_class_belong_to_the_batch():
    def plain(logits: Tensor, batch: Any) -> Tensor:
        return (batch["held"].below.w * F.cross_entropy(logits, batch["y"], reduction="none")).mean()

    def scaled(logits: Tensor, batch: Any) -> Tensor:
        return batch["held"].below.w.mean() * F.cross_entropy(logits, batch["y"])

    batch = batch_of(4)
    weighted = right(lambda logits, b: b["w"] * F.cross_entropy(logits, b["y"]), batch)
    batch = {"x": batch["x"], "y": batch["y"], "held": Held(batch["w"])}
    torch.testing.assert_close(scores_of_one_step(plain, batch), weighted, **CLOSE)
    with pytest.raises(MimicError, match=r"its normaliser or factor depends on the batch \(`mean` over the batch\)"):
        scores_of_one_step(scaled, batch)
