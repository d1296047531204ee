"""What a CLIP knows without having been trained for it: classes by their names, captions by their images."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchmetrics.functional.retrieval import retrieval_hit_rate

from lightning_mimic.errors import MimicError


class ZeroShot:
    """Names and templates from which a CLIP makes a classifier.

    Args:
        class_names: In the order of the labels.
        templates: Sentences with ``{}`` for the name; their embeddings are averaged.
        tokenizer: From sentences to int64 tokens ``(n, L)``.

    Raises:
        MimicError: No classes, no templates, or a template without ``{}``.

    Example:
        >>> zero_shot = ZeroShot(["cat", "dog"], ["a photo of a {}."], lambda texts: torch.zeros(len(texts), 4))
        >>> len(zero_shot.class_names)
        2
    """

    def __init__(
        self, class_names: Sequence[str], templates: Sequence[str], tokenizer: Callable[[list[str]], Tensor]
    ) -> None:
        # Plain lists: a configuration's own kind is none that open_clip takes.
        self.class_names, self.templates = list(class_names), list(templates)
        self.tokenizer = tokenizer
        if not self.class_names or not self.templates:
            raise MimicError(
                f"`zero_shot` has {len(self.class_names)} class names and {len(self.templates)} templates; give at "
                "least one of each."
            )
        for template in self.templates:
            if "{}" not in template:
                raise MimicError(f"`templates`: {template!r} has no place for the class's name; write {{}} there.")

    def weights(self, model: nn.Module) -> Tensor:
        """The classifier: unit vectors, shape ``(K, classes)``, on the model's device.

        Args:
            model: Has ``encode_text(tokens, normalize=True)``.
        """
        from open_clip import build_zero_shot_classifier  # needed to evaluate only

        device = next(model.parameters()).device
        arguments = (model, self.tokenizer, self.class_names, self.templates)
        weights: Tensor = build_zero_shot_classifier(*arguments, device=device)
        return weights


def recall_at_k(images: Tensor, texts: Tensor, same: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Retrieval in both directions: the share of queries with a right answer among the k nearest.

    Args:
        images: Embeddings, shape ``(N, K)``.
        texts: Those of their captions, in the same order.
        same: Boolean ``(N, N)``: text *j* is right for image *i*. Of itself, and where captions repeat.
        ks: How many answers are looked at; those above N are left out.

    Returns:
        ``image_to_text_R@k`` and ``text_to_image_R@k``, 0 to 1.

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
