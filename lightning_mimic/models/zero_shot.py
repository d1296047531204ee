"""Zero-shot evaluation of a CLIP: classification by class names, and image-text retrieval."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchmetrics.functional.retrieval import retrieval_hit_rate

from lightning_mimic.errors import MimicError


class ZeroShot:
    """Build a classifier from class names, templates and a CLIP.

    Args:
        class_names: Names of the classes, in the order of the labels.
        templates: Sentences with ``{}`` in place of the class name; their embeddings are averaged.
        tokenizer: Function from a list of n sentences to int64 tokens ``(n, L)``.

    Raises:
        MimicError: There are no class names or no templates, or a template has no ``{}``.

    Example:
        >>> zero_shot = ZeroShot(["cat", "dog"], ["a photo of a {}."], lambda texts: torch.zeros(len(texts), 4))
        >>> len(zero_shot.class_names)
        2
    """

    def __init__(
        self, class_names: Sequence[str], templates: Sequence[str], tokenizer: Callable[[list[str]], Tensor]
    ) -> None:
        # open_clip accepts plain lists only, not the list type of a configuration.
        self.class_names, self.templates = list(class_names), list(templates)
        self.tokenizer = tokenizer
        if not self.class_names or not self.templates:
            raise MimicError(
                f"`zero_shot` has {len(self.class_names)} class names and {len(self.templates)} templates; give at "
                "least one of each."
            )
        for template in self.templates:
            if "{}" not in template:
                raise MimicError(f"`templates`: {template!r} has no placeholder for the class name; insert {{}}.")

    def weights(self, model: nn.Module) -> Tensor:
        """Return the weights of the classifier: unit vectors, shape ``(K, classes)``, on the model's device.

        Args:
            model: Module with a method ``encode_text(tokens, normalize=True)``.
        """
        from open_clip import build_zero_shot_classifier  # needed for evaluation only

        device = next(model.parameters()).device
        arguments = (model, self.tokenizer, self.class_names, self.templates)
        weights: Tensor = build_zero_shot_classifier(*arguments, device=device)
        return weights


def recall_at_k(images: Tensor, texts: Tensor, same: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Return recall at k for retrieval of texts by image and of images by text.

    Recall at k is the share of queries with a correct answer among the k nearest.

    Args:
        images: Embeddings, shape ``(N, K)``.
        texts: Embeddings of the captions, shape ``(N, K)``, in the same order.
        same: Boolean, shape ``(N, N)``, whether text *j* is correct for image *i*: its own caption, or an equal one.
        ks: Values of k; values above N are skipped.

    Returns:
        ``image_to_text_R@k`` and ``text_to_image_R@k`` for each k, 0 to 1.

    Example:
        >>> same = torch.eye(2, dtype=torch.bool)
        >>> recall_at_k(torch.eye(2), torch.eye(2).flip(0), same, ks=[1, 2])  # doctest: +ELLIPSIS
        {'image_to_text_R@1': 0.0, 'image_to_text_R@2': 1.0, 'text_to_image_R@1': 0.0, ...}
    """
    cosines = nn.functional.normalize(images.float(), dim=1) @ nn.functional.normalize(texts.float(), dim=1).T
    found = {}
    for name, similarity, right in (("image_to_text", cosines, same), ("text_to_image", cosines.T, same.T)):
        for k in ks:
            if k <= len(cosines):
                hits = [retrieval_hit_rate(s, r, top_k=k) for s, r in zip(similarity, right, strict=True)]
                found[f"{name}_R@{k}"] = float(torch.stack(hits).mean())
    return found
