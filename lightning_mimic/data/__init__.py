"""Data modules, label noise, batches with sample ids, and cached features."""

from typing import TYPE_CHECKING

from lightning_mimic.lazy import lazy_front

if TYPE_CHECKING:
    from lightning_mimic.data.cached_features import CachedFeatures
    from lightning_mimic.data.ids import WithIds, collate_with_ids
    from lightning_mimic.data.noise import AsymmetricNoise, SymmetricNoise
else:
    __getattr__, __dir__ = lazy_front(
        __name__,
        {
            "lightning_mimic.data.cached_features": ["CachedFeatures"],
            "lightning_mimic.data.ids": ["WithIds", "collate_with_ids"],
            "lightning_mimic.data.noise": ["AsymmetricNoise", "SymmetricNoise"],
        },
    )

__all__ = ["AsymmetricNoise", "CachedFeatures", "SymmetricNoise", "WithIds", "collate_with_ids"]
