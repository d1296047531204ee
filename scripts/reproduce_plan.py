"""Which runs the paper's tables need."""

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

JOB = Path(__file__).with_name("reproduce_job.py")
#: The tables; those of detection are read off the runs of the first two.
TABLES = ("probe", "full", "quality", "efficiency", "temperature", "reference_quality", "floor")
METHODS = ("none", "official", "grad_mimic", "grad_norm", "rho_loss", "reference_loss", "agra", "grad_match")
RATES = (0.4, 0.5, 0.6)
ALL_RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
FRACTIONS = (0.8, 0.7, 0.6, 0.5)
TEMPERATURES = (0.03, 0.1, 0.3, 1.0, 3.0)
FLOORS = (0.0, 0.1, 0.25, 0.5)
REFERENCES = ("seen", "trusted_split")
#: Of a reference's own training labels.
CORRUPTED = (0.2, 0.4, 0.6)
#: By what a run's seed is less than its reference's, and than that of what stands for published weights.
OTHER_SEED, PRETRAINED_SEED = 100, 1000
#: Full fine-tuning with and without a floor: temperatures, and whether model and reference begin from the same weights.
FLOOR_TEMPERATURES = (0.1, 1.0)
STARTS = {"same": 0, "other": OTHER_SEED}
WHOLE = "model.freeze_backbone=false"
SAVED = "save_to=${hydra:runtime.output_dir}/model.ckpt"
#: Where a run's reference lies, below the folder of its setting.
OF_KIND = "{}/${{seed}}/${{hydra:runtime.choices.reference}}"
_GROUPS = ("mimic", "reference")
_QUIET = (
    "logger=none",
    "trainer.enable_progress_bar=false",
    "trainer.enable_checkpointing=false",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)


@dataclass(frozen=True)
class Sweep:
    """One multirun: every combination of the values of its keys.

    Attributes:
        name: Folder below the one of all runs.
        swept: Override to its values.
        fixed: Overrides of all its runs.
    """

    name: str
    swept: Mapping[str, Sequence[object]]
    fixed: Sequence[str]

    def folders(self, out: Path) -> list[Path]:
        """Of its runs, named by their values."""
        return [out.joinpath(self.name, *map(str, values)) for values in itertools.product(*self.swept.values())]

    def command(self, out: Path) -> list[str]:
        """What runs it."""
        names = [f"hydra:runtime.choices.{key}" if key in _GROUPS else key.lstrip("+") for key in self.swept]
        swept = [f"{key}={','.join(map(str, values))}" for key, values in self.swept.items()]
        folder = "/".join(f"${{{name}}}" for name in names) or "."
        where = [f"hydra.sweep.dir={out / self.name}", f"hydra.sweep.subdir={folder}"]
        return [sys.executable, str(JOB), "--multirun", *where, *swept, *_QUIET, *self.fixed]


def methods_of(data: str, reference: str) -> list[str]:
    """Those that can be run: influence needs trusted images."""
    return [*METHODS, *(["influence"] if data == "digits" or reference == "trusted_split" else [])]


@dataclass(frozen=True)
class Plan:
    """The sweeps of all tables, each in an order in which a run finds what it needs.

    Attributes:
        data: An experiment of conf/experiment/paper.
        seeds: Of weights, order, noise and, on the digits, the split.
        out: Folder of all runs.
        network: Folder of what stands for published weights, where there are none.
    """

    data: str
    seeds: Sequence[int]
    out: Path
    network: str = "pretrained"

    def sweeps(self, tables: Sequence[str]) -> list[Sweep]:
        """Of some tables, of :data:`TABLES`."""
        probes = set(tables) - {"full", "floor"}
        sweeps = self.pretrained() if probes or "full" in tables else []
        for seed in self.seeds:
            by_kind = {"reference": REFERENCES}
            if probes:
                sweeps.append(self.reference("references/probe", seed, by_kind, *self.kept))
            if "full" in tables:
                sweeps.append(self.reference("references/full", seed, by_kind, WHOLE))
        for table in (table for table in TABLES if table in tables):
            sweeps += getattr(self, table)()
        return sweeps

    def probe(self) -> list[Sweep]:
        return [self.compared("probe", kind, *self.kept) for kind in REFERENCES]

    def full(self) -> list[Sweep]:
        return [self.compared("full", kind, WHOLE) for kind in REFERENCES]

    def quality(self) -> list[Sweep]:
        each = {"reference": REFERENCES, "mimic": ["official"], "data.noise.rate": ALL_RATES}
        return [self.runs("quality", each, OF_KIND.format("probe"), *self.kept, "+filters=all")]

    def efficiency(self) -> list[Sweep]:
        common = [*self.kept, "reference=trusted_split", "data.noise.rate=0.4"]
        scores = f"+scored={self.out}/scored/official/${{seed}}/scores"
        each = {"+pick": ["mimic", "random"], "+fraction": FRACTIONS}
        by = OF_KIND.format("probe")
        return [
            self.runs("scored", {"mimic": ["official"]}, by, *common, "mimic.reweight=none"),
            self.runs("efficiency", each, by, *common, "mimic=none", scores),
            self.runs("efficiency_all", {}, by, *common, "mimic=none"),
        ]

    def temperature(self) -> list[Sweep]:
        each = {"mimic": ["official", "grad_mimic"], "mimic.temperature": TEMPERATURES, "data.noise.rate": [0.4, 0.6]}
        return [self.runs("temperature", each, OF_KIND.format("probe"), *self.kept, "reference=trusted_split")]

    def reference_quality(self) -> list[Sweep]:
        corrupted = {"data.noise.rate": CORRUPTED}
        made = [self.reference("references/corrupted", seed, corrupted, *self.kept) for seed in self.seeds]
        each, common = {"mimic": ["official"]}, [*self.kept, "data.noise.rate=0.4"]
        name, path = "reference_quality/{}", "corrupted/${{seed}}/{}"
        runs = [self.runs(name.format(rate), each, path.format(rate), *common) for rate in CORRUPTED]
        clean = self.runs("reference_quality/0.0", {"mimic": ["none", "official"]}, OF_KIND.format("probe"), *common)
        return [*made, *runs, clean]

    def floor(self) -> list[Sweep]:
        # Few features, as a vision transformer has beside its classes; with thousands nothing is misled on the digits.
        small = ["model.backbone.features=256"] if self.digits else []
        plan, noise = replace(self, network="pretrained_256"), "data.noise.rate=0.6"
        sweeps = plan.pretrained(*small)
        for start, more in STARTS.items():
            kind = {"reference": ["seen"]}
            sweeps += [plan.reference(f"references/{start}", s, kind, WHOLE, *small, more=more) for s in self.seeds]
        each = {"mimic.temperature": FLOOR_TEMPERATURES, "mimic.min_ess": FLOORS}
        for start, mimics in (("same", ["grad_mimic"]), ("other", ["official", "grad_mimic", "aligned"])):
            by = OF_KIND.format(start)
            sweeps.append(plan.runs(f"floor/{start}", {"mimic": mimics, **each}, by, WHOLE, noise, *small))
        plain = plan.runs("floor/plain", {"mimic": ["none"]}, OF_KIND.format("other"), WHOLE, noise, *small)
        return [*sweeps, plain]

    @property
    def digits(self) -> bool:
        return self.data == "digits"

    @property
    def kept(self) -> list[str]:
        """Has a frozen backbone's features kept; a small one's are computed as fast."""
        return [] if self.digits else [f"features={self.out}/features"]

    def pretrained(self, *fixed: str) -> list[Sweep]:
        """What stands for published weights, where there are none."""
        common = ["experiment=paper/digits_pretrained", SAVED, *fixed]
        return [
            Sweep(f"{self.network}/{seed}", {}, [f"seed={PRETRAINED_SEED + seed}", f"data.seed={seed}", *common])
            for seed in (self.seeds if self.digits else ())
        ]

    def reference(
        self, name: str, seed: int, swept: Mapping[str, Sequence[object]], *fixed: str, more: int = OTHER_SEED
    ) -> Sweep:
        """References of one seed's runs, of the same split."""
        experiment = f"experiment=[paper/{self.data},paper/reference]"
        return Sweep(
            f"{name}/{seed}", swept, [experiment, f"seed={seed + more}", SAVED, *self.split(str(seed)), *fixed]
        )

    def compared(self, setting: str, kind: str, *fixed: str) -> Sweep:
        """All methods at all rates."""
        each = {"reference": [kind], "mimic": methods_of(self.data, kind), "data.noise.rate": RATES}
        return self.runs(f"{setting}_{kind}", each, OF_KIND.format(setting), *fixed, "+filters=all")

    def runs(self, name: str, swept: Mapping[str, Sequence[object]], by: str, *fixed: str) -> Sweep:
        """Runs of every seed, by the references in a folder."""
        fixed = (f"paths.reference={self.out}/references/{by}/model.ckpt", *self.split("${seed}"), *fixed)
        return Sweep(name, {**swept, "seed": self.seeds}, [f"experiment=paper/{self.data}", *fixed])

    def split(self, seed: str) -> list[str]:
        """The digits' split goes by seed, and so does what was trained before, on the rest of them."""
        where = f"paths.pretrained={self.out}/{self.network}/{seed}/model.ckpt"
        return [f"data.seed={seed}", where] if self.digits else []
