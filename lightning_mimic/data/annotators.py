"""Labels that people gave, and where they were wrong."""

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
    """The mistakes of real annotators, from a file in the format of CIFAR-N: ``CIFAR-10_human.pt`` and its sister.

    The file is a dict, saved by ``torch.save``, of NumPy arrays of whole numbers: ``clean_label``, and from each
    annotator a label for every training image: ``aggre_label``, ``worse_label`` and ``random_label1`` to ``3`` for
    CIFAR-10, ``noisy_label`` for CIFAR-100. It is read without ever unpickling code.

    Args:
        path: Of the file.
        annotator: Whose labels.

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
        """The annotator's labels and the mask of wrong ones.

        Args:
            labels: True ones, int64, shape ``(n,)``.
            num_classes: Of these.
            rows: Of the training split, int64, shape ``(n,)``; the first ``n``, if left out.

        Returns:
            Labels, and boolean of the same shape, ``True`` where the label is wrong.

        Raises:
            MimicError: A file that is not there, is no such file or would need code to be read; an unknown annotator
                (with the nearest ones); or a file whose true labels are not those of the data.
        """
        check_labels(labels, num_classes)
        clean, given = self._read()
        rows = torch.arange(len(labels)) if rows is None else rows
        if len(rows) and int(rows.max()) >= len(clean):
            raise MimicError(
                f"`noise`: {self.path} has labels of {len(clean)} images, and the training split has more, at least "
                f"{int(rows.max()) + 1}; it is of another data set."
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
        # Of CIFAR-100 the file also has labels of the twenty groups of classes.
        annotators = [name for name in content if not name.startswith("clean") and "coarse" not in name]
        if self.annotator not in annotators:
            raise MimicError(
                f"`annotator`: {self.path} has none named {self.annotator!r}; "
                f"{nearest_names(self.annotator, annotators)}."
            )
        clean, given = content.get(_CLEAN), content[self.annotator]
        for name, array in ((_CLEAN, clean), (self.annotator, given)):
            if not (isinstance(array, np.ndarray) and array.ndim == 1 and array.dtype.kind in "iu"):
                raise MimicError(f"`noise`: {name!r} in {self.path} is no array of whole numbers, one per image.")
        assert clean is not None
        if len(clean) != len(given):
            raise MimicError(
                f"`noise`: {self.path} has {len(clean)} labels as {_CLEAN!r} and {len(given)} as {self.annotator!r}."
            )
        return torch.from_numpy(clean.astype("int64")), torch.from_numpy(given.astype("int64"))


def _arrays(path: Path) -> dict[str, Any]:
    import numpy as np

    if not path.is_file():
        raise MimicError(
            f"`noise`: no file {path}. CIFAR-N's are CIFAR-10_human.pt and CIFAR-100_human.pt, in the folder data of "
            "https://github.com/UCSC-REAL/cifar-10-100n."
        )
    # What an array of whole numbers is made of, by its names in NumPy 1 and 2; none of it runs a file's code.
    rebuild = np.empty(0).__reduce__()[0]
    names = [f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")]
    kinds = [type(np.dtype(kind)) for kind in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")]
    allowed: list[Any] = [np.ndarray, np.dtype, *kinds, *((rebuild, name) for name in names)]
    try:
        with fetched(path) as local, local.open("rb") as file:
            if file.read(2) == b"PK":  # torch compares no checksums
                check_archive(file, local.stat().st_size, str(path), "noise")
            file.seek(0)
            with torch.serialization.safe_globals(allowed):
                content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file ends in almost any type of error
        raise MimicError(
            f"`noise`: {path} is not read: it is not whole, or holds more than arrays of whole numbers, which could "
            "run code. Fetch it again; expected is a dict of arrays, saved by torch.save."
        ) from error
    if not isinstance(content, dict):
        raise MimicError(f"`noise`: {path} holds a {type(content).__name__}; expected a dict of arrays.")
    return {str(name): value for name, value in content.items()}
