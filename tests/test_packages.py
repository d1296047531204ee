"""One callback for both of Lightning's packages: the same numbers, whichever is installed."""

import json
import os
import subprocess
import sys
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch

from lightning_mimic import GradMimic, Ledger, WithIds, collate_with_ids
from lightning_mimic.trainer_package import package_of, pl
from support.toys import Toy, parameters_of, toy, toy_data, trainer

PACKAGES = [lightning.pytorch, pytorch_lightning]

# A user's own program, by the package that it imports; the other one cannot be imported where it is named.
PROGRAM = """
import json, sys
package, absent, folder = sys.argv[1:]
if absent != "none":
    sys.modules[absent] = None
import importlib
pl = importlib.import_module(package)
import torch
import torch.nn.functional as F
from lightning_mimic import AtCheckpoints, GradMimic, Ledger, WithIds, collate_with_ids
import lightning_mimic.callbacks, lightning_mimic.data, lightning_mimic.models

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        self.log("rows", float(len(batch[0])))
        return F.cross_entropy(self.head(torch.tanh(self.body(batch[0]))), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)

torch.manual_seed(0)
net, reference = Net(), Net()
x, y = torch.randn(12, 6), torch.randint(0, 3, (12,))
data = WithIds(torch.utils.data.TensorDataset(x, y))
loader = torch.utils.data.DataLoader(data, 4, collate_fn=collate_with_ids)

def fit(*callbacks, epochs):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    pl.Trainer(callbacks=list(callbacks), accelerator="cpu", max_epochs=epochs, **quiet).fit(net, loader)

fit(GradMimic(reference.state_dict(), "head", ledger=folder + "/train"), epochs=2)
torch.save(net.state_dict(), folder + "/net.pt")
scoring = GradMimic(reference.state_dict(), "all", reweight="none", ledger=folder + "/score")
fit(scoring, AtCheckpoints([folder + "/net.pt"]), epochs=1)
scores = [Ledger(folder + "/" + name).table()["score"].to_pylist() for name in ("train", "score")]
foreign = [n for n in sys.modules if n.split(".")[0] == absent and sys.modules[n] is not None]
base = GradMimic.__mro__[1].__module__.split(".")[0]
print(json.dumps({"scores": scores, "base": base, "foreign": foreign}))
"""

# Runs it once for each line of arguments, in processes forked from one that has imported torch, and none of the two.
FORKS = """
import os, sys
import torch, torchmetrics
program, *lines = sys.argv[1:]
for line in lines:
    if os.fork() == 0:
        sys.argv = ["program", *line.split(maxsplit=2)]
        exec(program, {"__name__": "__main__"})
        sys.stdout.flush()
        os._exit(0)
    if os.wait()[1]:
        sys.exit(f"failed: {line}")
"""

# The package that is used, and what cannot be imported.
INSTALLED = {
    "lightning, with both": ("lightning.pytorch", "none"),
    "pytorch_lightning, with both": ("pytorch_lightning", "none"),
    "lightning alone": ("lightning.pytorch", "pytorch_lightning"),
    "pytorch_lightning alone": ("pytorch_lightning", "lightning"),
}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_the_numbers_are_the_same_with_each_package_alone_and_with_both(tmp_path):
    lines = []
    for package, absent in INSTALLED.values():
        folder = tmp_path / package.replace(".", "-") / absent
        folder.mkdir(parents=True)
        lines.append(f"{package} {absent} {folder}")
    done = subprocess.run([sys.executable, "-c", FORKS, PROGRAM, *lines], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found: dict[str, Any] = dict(zip(INSTALLED, said, strict=True))
    for name in INSTALLED:
        assert found[name]["foreign"] == []
        assert found[name]["base"] == ("pytorch_lightning" if name == "pytorch_lightning alone" else "lightning")
    assert [len(scores) for scores in found["lightning alone"]["scores"]] == [24, 12]
    for name in INSTALLED:
        assert found[name]["scores"] == found["lightning alone"]["scores"], name


class Other(pytorch_lightning.LightningModule):
    """The toy with the other package's base class."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.lr = toy().body, toy().head, toy().lr

    forward = Toy.forward
    training_step = Toy.training_step
    configure_optimizers = Toy.configure_optimizers


def test_a_fit_with_the_other_package_takes_the_same_steps(tmp_path):
    ours, other = toy(), Other()
    reference = parameters_of(toy(seed=1))
    batches = torch.utils.data.DataLoader(WithIds(toy_data(12)), 4, collate_fn=collate_with_ids)
    trainer(GradMimic(reference, "head", ledger=tmp_path / "ours"), epochs=2).fit(ours, batches)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    callback = GradMimic(reference, "head", ledger=tmp_path / "other")
    pytorch_lightning.Trainer(callbacks=[callback], max_epochs=2, accelerator="cpu", **quiet).fit(other, batches)
    torch.testing.assert_close(parameters_of(other), parameters_of(ours), rtol=0, atol=0)
    tables = [Ledger(tmp_path / name).table()["score"].to_pylist() for name in ("ours", "other")]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.__name__)
def test_a_trainers_package_is_its_own_also_if_it_is_derived(package):
    class Derived(package.Trainer):
        pass

    for kind in (package.Trainer, Derived):
        assert package_of(kind(accelerator="cpu", logger=False)) is package
    with pytest.raises(TypeError, match=r"builtins\.str; expected the Trainer of `lightning`"):
        package_of("trainer")
    assert pl is lightning.pytorch


def test_a_module_of_one_package_in_a_trainer_of_the_other_is_refused():
    callback = GradMimic(parameters_of(toy(seed=1)), "head")
    for package, module in ((lightning.pytorch, Other()), (pytorch_lightning, toy())):
        fit = package.Trainer(accelerator="cpu", logger=False)
        with pytest.raises(TypeError, match="their classes do not mix"):
            callback.setup(fit, module, "fit")
