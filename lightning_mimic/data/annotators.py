"""Label noise from human annotators, read from files such as those of CIFAR-N."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_mimic.data.noise import check_labels
from lightning_mimic.errors import MimicError, nearest_names
from lightning_mimic.files import fetched
from lightning_mimic.reference.archive import check_archive
from lightning_mimic.stores import path_of

_CLEAN = "clean_label"


class AnnotatorNoise:
    """Replace labels by those of human annotators, from a file in the format of CIFAR-N.

    The file is a dict of integer NumPy arrays, saved by ``torch.save``, with one label per training image in each:
    ``clean_label``, and for each annotator another array, ``aggre_label``, ``worse_label`` and ``random_label1`` to
    ``3`` for CIFAR-10 (``CIFAR-10_human.pt``), ``noisy_label`` for CIFAR-100. Reading it never executes pickled code.

    Args:
        path: Path of the file.
        annotator: Name of the array with the labels to use.

    Example:
        >>> import tempfile, numpy as np
        >>> path = tempfile.mkdtemp() + "/people.pt"
        >>> torch.save({"clean_label": np.array([0, 1, 2]), "worse_label": np.array([0, 2, 2])}, path)
        >>> AnnotatorNoise(path, "worse_label")(torch.tensor([1, 2]), num_classes=3, rows=torch.tensor([1, 2]))
        (tensor([2, 2]), tensor([ True, False]))
    """

    def __init__(self, path: str | Path, annotator: str) -> None:
        self.path = path_of(path, "noise")
        self.annotator = annotator

    def __call__(self, labels: Tensor, num_classes: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the annotator's labels and a mask of the wrong ones.

        Args:
            labels: True labels, int64, shape ``(n,)``.
            num_classes: Number of classes.
            rows: Row numbers in the training split, int64, shape ``(n,)``; ``None``: the first ``n`` rows.

        Returns:
            Labels, and a boolean tensor of the same shape, ``True`` if the label is wrong.

        Raises:
            MimicError: The file does not exist, has another format or contains more than arrays; the annotator is
                unknown; or the true labels in the file differ from those of the data.
        """
        check_labels(labels, num_classes)
        clean, given = self._read()
        rows = torch.arange(len(labels)) if rows is None else rows
        if len(rows) and int(rows.max()) >= len(clean):
            raise MimicError(
                f"`noise`: {self.path} has labels of {len(clean)} images, but the training split has at least "
                f"{int(rows.max()) + 1}; the file is of another data set."
            )
        if unlike := int((clean[rows] != labels).sum()):
            raise MimicError(
                f"`noise`: {_CLEAN!r} in {self.path} is not the true label of {unlike} of {len(labels)} images; the "
                "file is of another data set, of another split, or in another order."
            )
        noisy = given[rows]
        check_labels(noisy, num_classes)
        return noisy, noisy != labels

    def _read(self) -> tuple[Tensor, Tensor]:
        import numpy as np

        content = _arrays(self.path)
        # The file for CIFAR-100 also has labels of the twenty superclasses.
        annotators = [name for name in content if not name.startswith("clean") and "coarse" not in name]
        if self.annotator not in annotators:
            raise MimicError(
                f"`annotator`: {self.path} has no labels {self.annotator!r}; "
                f"{nearest_names(self.annotator, annotators)}."
            )
        clean, given = content.get(_CLEAN), content[self.annotator]
        for name, array in ((_CLEAN, clean), (self.annotator, given)):
            if not (isinstance(array, np.ndarray) and array.ndim == 1 and array.dtype.kind in "iu"):
                raise MimicError(f"`noise`: {name!r} in {self.path} is not an array of whole numbers, one per image.")
        assert clean is not None
        if len(clean) != len(given):
            raise MimicError(
                f"`noise`: {self.path} is damaged: {_CLEAN!r} has {len(clean)} labels, {self.annotator!r} {len(given)}."
            )
        return torch.from_numpy(clean.astype("int64")), torch.from_numpy(given.astype("int64"))


def _arrays(path: Path) -> dict[str, Any]:
    import numpy as np

    if not path.is_file():
        raise MimicError(
            f"`noise`: no file {path}. Download CIFAR-10_human.pt or CIFAR-100_human.pt of CIFAR-N from the folder "
            "data of https://github.com/UCSC-REAL/cifar-10-100n."
        )
    # Types that make up an array of whole numbers, by their names in NumPy 1 and 2; none executes code of the file.
    rebuild = np.empty(0).__reduce__()[0]
    names = [f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")]
    kinds = [type(np.dtype(kind)) for kind in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")]
    allowed: list[Any] = [np.ndarray, np.dtype, *kinds, *((rebuild, name) for name in names)]
    try:
        with fetched(path) as local, local.open("rb") as file:
            if file.read(2) == b"PK":  # torch does not verify checksums
                check_archive(file, local.stat().st_size, str(path), "noise")
            file.seek(0)
            with torch.serialization.safe_globals(allowed):
                content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises almost any type of error
        raise MimicError(
            f"`noise`: {path} cannot be read: it is damaged, or contains more than arrays of whole numbers, which "
            "could run code. Expected a dict of arrays, saved by torch.save; download the file again."
        ) from error
    if not isinstance(content, dict):
        raise MimicError(f"`noise`: {path} holds a {type(content).__name__}; expected a dict of arrays.")
    return {str(name): value for name, value in content.items()}
