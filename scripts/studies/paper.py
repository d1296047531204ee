"""The paper's tables: data x noise x method x seed. Nothing is chosen; the settings are the official ones."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torchmetrics.functional import pearson_corrcoef

from scripts.provenance import ROOT
from scripts.studies.lab import MODEL, Lab, Runs
from scripts.studies.paper_figures import SOURCE, linear_probe
from scripts.studies.study import Chosen, Part, Study
from scripts.studies.tables import Table, percent

#: Experiments of conf/experiment/paper.
DATA = sorted(
    path.stem
    for path in (ROOT / "conf" / "experiment" / "paper").glob("*.yaml")
    if path.stem not in ("official", "reference", "digits_pretrained")
)
METHODS = {
    "none": "plain",
    "official": "Grad-Mimic",
    "grad_mimic": "Grad-Mimic, floor",
    "grad_norm": "gradient norm",
    "rho_loss": "RHO-loss",
    "reference_loss": "reference's loss",
    "agra": "AGRA",
    "grad_match": "Grad-Match",
    "influence": "influence",
}
REFERENCES = {"seen": "a reference that has seen the scored images", "trusted_split": "a reference from trusted images"}
RATES = (0.4, 0.5, 0.6)
ALL_RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
FRACTIONS = (0.8, 0.7, 0.6, 0.5)
TEMPERATURES = (0.03, 0.1, 0.3, 1.0, 3.0)
FLOORS = (0.0, 0.1, 0.25, 0.5)
FLOOR_TEMPERATURES = (0.1, 1.0)
#: Of a reference's own training labels.
CORRUPTED = (0.2, 0.4, 0.6)
#: By what the seed of a reference is more than its run's, and that of what stands for published weights.
OTHER_SEED, PRETRAINED_SEED = 100, 1000
WHOLE = "model.freeze_backbone=false"
PROBE = {"probe": "Linear probe", "full": "Full fine-tuning"}
OF_KIND = "${hydra:runtime.choices.reference}"


@dataclass(frozen=True)
class Runner:
    """The runs of all tables.

    Attributes:
        lab: Runs them.
        data: Of :data:`DATA`.
        network: Overrides of the digits' network.
    """

    lab: Lab
    data: str
    network: Sequence[str] = ()

    @property
    def digits(self) -> bool:
        return self.data == "digits"

    @property
    def suffix(self) -> str:
        """Of the folders of what is trained with another network."""
        return "_small" if self.network else ""

    @property
    def probe(self) -> list[str]:
        """Has a frozen backbone's features kept; a small one's are computed as fast."""
        return [] if self.digits else [f"features={self.lab.out}/features"]

    def pretrained(self) -> None:
        """What stands for published weights, where there are none."""
        if self.digits:
            seeds = {"seed": [seed + PRETRAINED_SEED for seed in self.lab.seeds]}
            split = f'data.split_seed="${{add:${{seed}},-{PRETRAINED_SEED}}}"'
            name = f"pretrained{self.suffix}"
            self.lab.sweep(name, seeds, "experiment=paper/digits_pretrained", split, MODEL, *self.network)

    def references(self, name: str, each: Mapping[str, Sequence[object]], *fixed: str, more: int = OTHER_SEED) -> Runs:
        """References of the runs' splits and of seeds that are ``more`` than the runs'."""
        self.pretrained()
        seeds = [seed + more for seed in self.lab.seeds]
        experiment = f"experiment=[paper/{self.data},paper/reference]"
        return self.lab.sweep(
            f"references/{name}", {**each, "seed": seeds}, experiment, MODEL, *self.split(-more), *self.network, *fixed
        )

    def both(self, setting: str) -> Runs:
        """The references of linear probes, or of full fine-tuning."""
        return self.references(setting, {"reference": list(REFERENCES)}, *self.setting(setting))

    def setting(self, setting: str) -> list[str]:
        return [WHOLE] if setting == "full" else self.probe

    def runs(
        self, name: str, each: Mapping[str, Sequence[object]], reference: str, *fixed: str, more: int = OTHER_SEED
    ) -> Runs:
        """Runs of every seed, with the references of a folder."""
        path = f"{self.lab.out}/references/{reference}/${{add:${{seed}},{more}}}/model.ckpt"
        fixed = (f"experiment=paper/{self.data}", f'paths.reference="{path}"', *self.split(0), *self.network, *fixed)
        return self.lab.sweep(name, {**each, "seed": self.lab.seeds}, *fixed)

    def split(self, more: int) -> list[str]:
        """The digits' split goes by the run's seed, and so does what was trained before, on the trusted images."""
        folder = f"{self.lab.out}/pretrained{self.suffix}/${{add:${{data.split_seed}},{PRETRAINED_SEED}}}"
        split = f'data.split_seed="${{add:${{seed}},{more}}}"'
        return [split, f'paths.pretrained="{folder}/model.ckpt"'] if self.digits else []

    def methods(self, kind: str) -> list[str]:
        """Those that can be run: influence needs trusted images."""
        return [m for m in METHODS if m != "influence" or self.digits or kind == "trusted_split"]


def found(figure: str, name: str = "sign") -> Callable[[Any], float | None]:
    """A figure of a run's wrong labels as one filter finds them; unknown where there are none."""
    return lambda result: result.get("filters", {}).get(name, {}).get(figure)


def compared(setting: str, data: str, lab: Lab, chosen: Chosen) -> Iterator[Table]:
    """Accuracy and detection, by method and rate, with either reference."""
    run = Runner(lab, data)
    references = run.both(setting)
    for kind, what in REFERENCES.items():
        each = {"reference": [kind], "mimic": run.methods(kind), "data.noise.rate": RATES}
        runs = run.runs(f"{setting}_{kind}", each, f"{setting}/{OF_KIND}", *run.setting(setting), "+study.filters=all")
        cells = {
            ("the reference", percent(rate)): references.where(reference=kind).values("accuracy") for rate in RATES
        }
        aurocs, f1 = {}, {}
        for method, rate in itertools.product(run.methods(kind), RATES):
            of = runs.where(mimic=method, rate=rate)
            cells[METHODS[method], percent(rate)] = of.values("accuracy")
            if method != "none":
                aurocs[METHODS[method], percent(rate)] = of.values("auroc")
        for name in ("sign", "threshold 1/B", "k-means", "mixture", "label model of the last three"):
            for rate in RATES:
                f1[name, percent(rate)] = runs.where(mimic="official", rate=rate).values(found("f1", name))
        # The paper's reference has seen the images.
        paper = linear_probe(data) if (setting, kind) == ("probe", "seen") else {}
        name, title = f"{setting}_{kind}", f"{PROBE[setting]} with {what}"
        yield Table(name, f"{title}: test accuracy by share of wrong labels", "method", cells, (), paper, SOURCE)
        yield Table(f"{name}_auroc", f"{title}: AUROC of finding wrong labels by a low mean score", "scores", aurocs)
        yield Table(f"{name}_f1", f"{title}: F1 of wrong labels by filter on the mimic scores", "filter", f1)


def quality(data: str, lab: Lab, chosen: Chosen) -> Iterator[Table]:
    """The share that a filter keeps against the share that is right."""
    run = Runner(lab, data)
    run.both("probe")
    each = {"reference": list(REFERENCES), "mimic": ["official"], "data.noise.rate": ALL_RATES}
    runs = run.runs("quality", each, f"probe/{OF_KIND}", *run.probe, "+study.filters=all")
    cells: dict[tuple[str, str], list[float]] = {}
    for kind, name in itertools.product(REFERENCES, ("sign", "label model of the last three")):
        row = f"{name}, {kind.replace('_', ' ')}"
        shares = {
            share: [runs.where(reference=kind, rate=rate).values(found(share, name)) for rate in ALL_RATES]
            for share in ("share_kept", "share_right")
        }
        cells |= {(row, percent(rate)): values for rate, values in zip(ALL_RATES, shares["share_kept"], strict=True)}
        # Where a filter could not decide in one of the runs there is no correlation.
        if {len(values) for values in shares["share_kept"]} == {len(lab.seeds)}:
            pairs = zip(*(torch.tensor(shares[share]).T for share in ("share_kept", "share_right")), strict=True)
            # Nor where it keeps the same of all.
            cells[row, "correlation"] = [100 * float(pearson_corrcoef(k, r)) for k, r in pairs if k.std() > 0]
    yield Table("quality", "Share kept, and its correlation with the share that is right (x 100)", "filter", cells)


def efficiency(data: str, lab: Lab, chosen: Chosen) -> Iterator[Table]:
    """Accuracy of plain training on parts of the data."""
    run = Runner(lab, data)
    run.both("probe")
    by, common = f"probe/{OF_KIND}", [*run.probe, "reference=trusted_split", "data.noise.rate=0.4"]
    run.runs("scored", {"mimic": ["official"]}, by, *common, "mimic.reweight=none")
    scores = f"+study.scored={lab.out}/scored/official/${{seed}}/scores"
    each = {"+study.pick": ["mimic", "random"], "+study.fraction": FRACTIONS}
    parts = run.runs("efficiency", each, by, *common, "mimic=none", scores)
    whole = run.runs("efficiency_all", {}, by, *common, "mimic=none").values("accuracy")
    cells = {}
    for pick, name in (("mimic", "highest mimic scores"), ("random", "drawn at random")):
        cells[name, "100 %"] = whole
        for fraction in FRACTIONS:
            cells[name, percent(fraction)] = parts.where(pick=pick, fraction=fraction).values("accuracy")
    title = "Data efficiency, 40 % wrong labels: test accuracy of plain training on a share of the samples"
    yield Table("efficiency", f"{title}, chosen with {REFERENCES['trusted_split']}", "samples", cells)


def temperature(data: str, lab: Lab, chosen: Chosen) -> Iterator[Table]:
    """Accuracy, and how many samples had a say."""
    run = Runner(lab, data)
    run.both("probe")
    each = {"mimic": ["official", "grad_mimic"], "mimic.temperature": TEMPERATURES, "data.noise.rate": [0.4, 0.6]}
    runs = run.runs("temperature", each, f"probe/{OF_KIND}", *run.probe, "reference=trusted_split")
    for figure, what in (("accuracy", "test accuracy"), ("ess", "effective sample size of a batch")):
        cells = {
            (f"{METHODS[mimic]}, {percent(rate)} wrong", f"{t:g}"): runs.where(
                mimic=mimic, temperature=t, rate=rate
            ).values(figure)
            for mimic, rate, t in itertools.product(("official", "grad_mimic"), (0.4, 0.6), TEMPERATURES)
        }
        title = f"Temperature, linear probe with {REFERENCES['trusted_split']}: {what}"
        yield Table(f"temperature_{figure}", title, "method", cells)


def reference_quality(data: str, lab: Lab, chosen: Chosen) -> Iterator[Table]:
    """What a reference from corrupted labels is worth."""
    run = Runner(lab, data)
    clean = run.both("probe").where(reference="seen")
    corrupted = run.references("corrupted", {"data.noise.rate": CORRUPTED}, *run.probe)
    common = [*run.probe, "data.noise.rate=0.4"]
    first = run.runs("reference_quality/0.0", {"mimic": ["none", "official"]}, f"probe/{OF_KIND}", *common)
    cells = {}
    for rate in (0.0, *CORRUPTED):
        column, references, runs = percent(rate), clean, first
        if rate:
            references = corrupted.where(rate=rate)
            runs = run.runs(f"reference_quality/{rate}", {"mimic": ["official"]}, f"corrupted/{rate}", *common)
        cells["the reference", column] = references.values("accuracy")
        cells["Grad-Mimic with it", column] = runs.where(mimic="official").values("accuracy")
        cells["AUROC of its scores", column] = runs.where(mimic="official").values("auroc")
        cells["plain", column] = first.where(mimic="none").values("accuracy")
    title = "Reference quality, 40 % wrong labels: references that learnt the scored images, with wrong labels"
    yield Table("reference_quality", title, "figure", cells)


def floor(data: str, lab: Lab, chosen: Chosen) -> Iterator[Table]:
    """Full fine-tuning at 60 % with and without a floor on the effective sample size."""
    # Few features, as a vision transformer has beside its classes; with thousands nothing is misled on the digits.
    run = Runner(lab, data, ["model.backbone.features=256"] if data == "digits" else [])
    starts, noise, references, runs = {"same": 0, "other": OTHER_SEED}, "data.noise.rate=0.6", {}, {}
    each = {"mimic.temperature": FLOOR_TEMPERATURES, "mimic.min_ess": FLOORS}
    mimics = {"same": ["grad_mimic"], "other": ["official", "grad_mimic", "aligned"]}
    for start, more in starts.items():
        references[start] = run.references(start, {"reference": ["seen"]}, WHOLE, more=more)
        by = f"{start}/{OF_KIND}"
        runs[start] = run.runs(f"floor/{start}", {"mimic": mimics[start], **each}, by, WHOLE, noise, more=more)
    plain = run.runs("floor/plain", {"mimic": ["none"]}, f"other/{OF_KIND}", WHOLE, noise)
    rows = (
        ("same", "grad_mimic", "same start"),
        ("other", "official", "other start, head alone"),
        ("other", "grad_mimic", "other start"),
        ("other", "aligned", "other start, aligned"),
    )
    title = f"{PROBE['full']}, 60 % wrong labels, with {REFERENCES['seen']}, by min_ess"
    for figure, what in (
        ("accuracy", "test accuracy"),
        ("ess", "effective sample size of a batch"),
        ("auroc", "AUROC"),
    ):
        cells = {}
        for least in FLOORS:
            column = f"{least:g}"
            if figure == "accuracy":
                cells["plain", column] = plain.values(figure)
                for start in starts:
                    cells[f"reference, {start} start", column] = references[start].values(figure)
            for (start, mimic, name), t in itertools.product(rows, FLOOR_TEMPERATURES):
                of = runs[start].where(mimic=mimic, temperature=t, min_ess=least)
                cells[f"{name}, τ {t:g}", column] = of.values(figure)
        yield Table(f"floor_{figure}", f"{title}: {what}", "reference", cells, "min_ess")


def study(data: str) -> Study:
    """Of one data set."""
    reports = {
        "probe": partial(compared, "probe"),
        "full": partial(compared, "full"),
        "quality": quality,
        "efficiency": efficiency,
        "temperature": temperature,
        "reference_quality": reference_quality,
        "floor": floor,
    }
    parts = {name: Part(partial(report, data)) for name, report in reports.items()}
    return Study(f"The paper's tables on {data}", parts)
