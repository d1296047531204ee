"""The second job of `make demo`: a network from scratch on wrong labels, with a reference that began elsewhere."""

import statistics
from collections.abc import Iterator, Sequence
from functools import partial

from scripts.studies.digits import EACH_EPOCH, OTHER_START, SPLIT, choose_plain, gaps, path_of, references
from scripts.studies.lab import Lab, Runs
from scripts.studies.study import Chosen, Part, Study
from scripts.studies.tables import Table, percent

LEARNING_RATES = (3e-4, 1e-3, 3e-3)
TEMPERATURES = (1.0, 0.3, 0.1, 0.03)  # of equals, the first: the one that trusts the scores least
#: Overrides of mimic-train by the name of a network.
NETWORKS = {
    "cnn": ["model.backbone.width=32", "model.backbone.features=256"],
    "mlp": ["model/backbone=mlp"],
    "vit": [
        "model/backbone=timm",
        "model.backbone.name=vit_tiny_patch16_224",
        "model.backbone.in_chans=1",
        *(f"+model.backbone.{option}" for option in ("img_size=8", "patch_size=2", "embed_dim=64", "depth=2")),
        *(f"+model.backbone.{option}" for option in ("num_heads=4", "global_pool=avg", "weight_init=jax")),
    ],
}
METHODS = {
    "none": "plain",
    "grad_mimic": "Grad-Mimic, not aligned",
    "aligned": "Grad-Mimic, aligned",
    "reference_loss": "weights by the reference's loss",
}


def common(lab: Lab, model: str, teacher: str, rate: float, epochs: int) -> list[str]:
    """Overrides of every run on wrong labels."""
    schedule = f"{{_target_:torch.optim.lr_scheduler.CosineAnnealingLR,_partial_:true,T_max:{epochs}}}"
    return [
        "experiment=digits_scratch",
        path_of(lab, f"references_{teacher}", OTHER_START),
        f"data.noise.rate={rate}",
        f"model.scheduler={schedule}",
        f"trainer.max_epochs={epochs}",
        *NETWORKS[model],
    ]


def mimic_of(model: str, teacher: str) -> list[str]:
    """Overrides of the aligned method."""
    if model == teacher:
        return ["mimic=aligned"]
    # Of another architecture: the same groups, where the reference's module is made.
    made = (
        word.replace("model/backbone=", "model/backbone@mimic.reference.reference.module.backbone=").replace(
            "model.backbone.", "mimic.reference.reference.module.backbone."
        )
        for word in NETWORKS[teacher]
    )
    return ["mimic=aligned_architecture", *made]


def choose(model: str, teacher: str, rates: Sequence[float], epochs: int, lab: Lab) -> Chosen:
    """Plain training's learning rate, and then the temperature of the aligned method."""
    make_references(lab, teacher)
    chosen = {}
    for rate in rates:
        fixed, name = common(lab, model, teacher, rate, epochs), f"{model}_{teacher}_{rate:g}"
        learning_rate, _ = choose_plain(lab, f"plain_{name}", LEARNING_RATES, epochs, fixed)
        tried = aligned(lab, f"aligned_{name}", fixed, TEMPERATURES, mimic_of(model, teacher), learning_rate)
        temperature = max(TEMPERATURES, key=lambda t: statistics.fmean(tried.where(temperature=t).values("accuracy")))
        chosen[f"{rate:g}"] = [learning_rate, temperature]
    return chosen


def make_references(lab: Lab, teacher: str) -> Runs:
    """References from other initial weights than the runs'."""
    return references(lab, f"references_{teacher}", "data.augment=false", *NETWORKS[teacher], more=OTHER_START)


def aligned(
    lab: Lab, name: str, fixed: Sequence[str], temperatures: Sequence[float], mimic: Sequence[str], learning_rate: float
) -> Runs:
    """The aligned method at some temperatures."""
    each = {"mimic.temperature": temperatures, "seed": lab.seeds}
    return lab.sweep(name, each, *fixed, *mimic, f"model.optimizer.lr={learning_rate}", SPLIT, EACH_EPOCH)


def report(model: str, teacher: str, rates: Sequence[float], epochs: int, lab: Lab, chosen: Chosen) -> Iterator[Table]:
    """All methods; the aligned one at the default temperature and at the chosen one."""
    trusted = make_references(lab, teacher)
    for rate in rates:
        learning_rate, temperature = chosen[f"{rate:g}"]
        fixed, name = common(lab, model, teacher, rate, epochs), f"{model}_{teacher}_{rate:g}"
        # Weights and losses can be asked only of a reference of the model's own architecture.
        methods = ["none", "grad_mimic", "reference_loss"] if model == teacher else ["none"]
        others = lab.sweep(
            f"others_{name}",
            {"mimic": methods, "seed": lab.seeds},
            *fixed,
            f"model.optimizer.lr={learning_rate}",
            SPLIT,
            EACH_EPOCH,
        )
        runs = {(METHODS[method], "–" if method == "none" else "1"): others.where(mimic=method) for method in methods}
        tried = aligned(
            lab,
            f"aligned_{name}",
            fixed,
            list(dict.fromkeys((1.0, temperature))),
            mimic_of(model, teacher),
            learning_rate,
        )
        for t in dict.fromkeys((1.0, temperature)):
            runs[METHODS["aligned"], f"{t:g}{'*' * (t == temperature)}"] = tried.where(temperature=t)
        plain, cells = others.where(mimic="none"), {}
        for figure, head in (("accuracy", "test, last"), ("best_accuracy", "test, best")):
            cells["the reference", head] = trusted.values(figure)
        for (method, tau), of in runs.items():
            row = f"{method}, τ = {tau}" if tau != "–" else method
            cells[row, "test, last"], cells[row, "test, best"] = of.values("accuracy"), of.values("best_accuracy")
            cells[row, "over the reference"] = gaps(of, trusted, "accuracy")
            if method != "plain":
                cells[row, "over plain's best"] = gaps(of, plain, "best_accuracy")
                cells[row, "over plain's last"] = gaps(of, plain, "accuracy")
                cells[row, "AUROC"] = of.values("auroc")
        title = (
            f"{percent(rate)} wrong labels, {model} from scratch, reference: {teacher} of another start; learning rate "
        )
        title += f"{learning_rate:g}, {epochs} epochs"
        signed = ["over the reference", "over plain's best", "over plain's last"]
        yield Table(f"aligned_{name}", title, "method", cells, signed=signed)


def part(
    model: str, teacher: str, rates: Sequence[float], epochs: int = 15, seeds: Sequence[int] | None = None
) -> Part:
    """One pair of networks."""
    given = (model, teacher, rates, epochs)
    return Part(partial(report, *given), partial(choose, *given), seeds)


STUDY = Study(
    "From scratch, with a reference of another start",
    {
        "noisy": part("cnn", "cnn", (0.4, 0.6)),
        "clean": part("cnn", "cnn", (0.0,), seeds=(0, 1, 2, 3, 4)),
        "mlp": part("cnn", "mlp", (0.4,)),
        "vit": part("vit", "mlp", (0.4,), epochs=30),
    },
)
