"""Data sets, label noise, and batches that carry ids."""

from lightning_mimic.data.ids import WithIds, collate_with_ids
from lightning_mimic.data.noise import AsymmetricNoise, SymmetricNoise

__all__ = ["AsymmetricNoise", "SymmetricNoise", "WithIds", "collate_with_ids"]
