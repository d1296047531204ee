"""How good must a reference be: noise on its weights, and references of falling accuracy (the paper's ablation)."""

from collections import Counter
from collections.abc import Iterator

from scripts.studies.digits import EACH_EPOCH, OTHER_START, SPLIT, noisy_digits, path_of, reference_logits, references
from scripts.studies.lab import Lab, Runs
from scripts.studies.study import Chosen, Part, Study
from scripts.studies.tables import Table

NOISE = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)  # over the standard deviation of each tensor
EPOCHS = (80, 20, 10, 5, 2, 1)  # of the reference's training
RATE = "data.noise.rate=0.4"
NETWORK = "model.backbone.features=256"
# As in the demo and in the study `aligned`; nothing is chosen here.
PROBE = ["experiment=digits_noisy", "model.optimizer.lr=1e-4", "trainer.max_epochs=4"]
SCRATCH = ["experiment=digits_scratch", "model.optimizer.lr=1e-3", "trainer.max_epochs=15", NETWORK]
ALIGNED = [*SCRATCH, "mimic=aligned", "mimic.temperature=0.1"]
SERIES = {
    "probe": ("a new head on its backbone", "noise on the reference's head"),
    "noise": ("from scratch, aligned", "noise on all its weights"),
    "epochs": ("from scratch, aligned", "epochs it was trained for"),
}


def report(lab: Lab, chosen: Chosen) -> Iterator[Table]:
    """What is found and learnt with worse and worse references."""
    common = [RATE, SPLIT, EACH_EPOCH]
    references(lab, "probes")
    for epochs in EPOCHS:
        told = ["data.augment=false", NETWORK, f"trainer.max_epochs={epochs}"]
        references(lab, f"references_{epochs}", *told, more=OTHER_START)
    each = {"+study.noise": NOISE, "seed": lab.seeds}
    backbone = f"model.pretrained={lab.out}/probes/${{seed}}/model.ckpt"  # without the noise
    head = [path_of(lab, "probes"), backbone, "+study.noise_on=head."]
    whole = [path_of(lab, f"references_{EPOCHS[0]}", OTHER_START)]
    probes = lab.sweep("probe", each, *PROBE, *common, *head)
    noisy = lab.sweep("noise", each, *ALIGNED, *common, *whole)
    runs = {("probe", n): probes.where(noise=n) for n in NOISE} | {("noise", n): noisy.where(noise=n) for n in NOISE}
    for epochs in EPOCHS:
        where = path_of(lab, f"references_{epochs}", OTHER_START)
        runs["epochs", epochs] = lab.sweep(f"epochs_{epochs}", {"seed": lab.seeds}, *ALIGNED, *common, where)
    plain = lab.sweep("plain", {"seed": lab.seeds}, *SCRATCH, *common, "mimic=none")

    cells = {}
    for (series, amount), of in runs.items():
        row = f"{SERIES[series][0]}; {SERIES[series][1]}: {amount:g}"
        cells[row, "the reference"] = accuracies(lab, series, amount, of)
        cells[row, "AUROC"] = of.values("auroc")
        cells[row, "the model"] = of.values("accuracy")
        verdicts = Counter(run.result["verdict"] for run in of).most_common()
        cells[row, "verdicts"] = ", ".join(f"{verdict} {count}" for verdict, count in verdicts)
    cells["plain training", "the model"] = plain.values("accuracy")
    cells["plain training, best epoch", "the model"] = plain.values("best_accuracy")
    yield Table("reference_quality", "40 % wrong labels", "what is trained; what was done to the reference", cells)


def accuracies(lab: Lab, series: str, amount: float, runs: Runs) -> list[float]:
    """Of the references that the runs were given, on the test images."""
    found = []
    for run in runs:
        images, labels = next(iter(noisy_digits(int(run.values["seed"]), 0.0).test_dataloader()))
        made = f"references_{amount:g}", str(run.values["seed"] + OTHER_START), "model.ckpt"
        path = lab.folder(*made) if series == "epochs" else run.folder / "reference.pt"
        logits = reference_logits(path, images, *([] if series == "probe" else [NETWORK]))
        found.append(100 * float((logits.argmax(1) == labels).float().mean()))
    return found


STUDY = Study("How good must a reference be?", {"noise": Part(report)})
