"""The libraries whose modules are tried, and how each is installed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Library:
    """How a library gets into an environment of its own.

    Attributes:
        title: Of its section.
        packages: That are installed with their dependencies, where the base environment has not got them.
        alone: That are installed without their dependencies.
    """

    title: str
    packages: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()
    of_base: tuple[str, ...] = ()

    @property
    def shown(self) -> tuple[str, ...]:
        """The packages whose versions are stated."""
        return self.of_base or (self.alone or self.packages)[:2]


#: By name, which is that of the module with their cases.
LIBRARIES = {
    "lightning": Library("Lightning's demos", of_base=("lightning",)),
    "timm": Library("timm", of_base=("timm",)),
    "torchgeo": Library("TorchGeo", ("torchgeo", "requests")),
    "segmentation_models_pytorch": Library("segmentation_models_pytorch", ("segmentation-models-pytorch",)),
    "transformers": Library("Hugging Face transformers and peft", ("transformers", "peft")),
    "torch_geometric": Library("PyTorch Geometric", ("torch-geometric",)),
    "lightly": Library("lightly", ("lightly",)),
    "chemprop": Library("chemprop", ("chemprop",)),
    "torch_uncertainty": Library("torch-uncertainty", ("torch-uncertainty",)),
    "scvi": Library("scvi-tools", ("scvi-tools",)),
    "pytorch_forecasting": Library("pytorch-forecasting", ("scikit-base<1.1.0",), alone=("pytorch-forecasting",)),
    "anomalib": Library("anomalib", ("anomalib",)),
    "darts": Library("darts", ("darts",)),
}
