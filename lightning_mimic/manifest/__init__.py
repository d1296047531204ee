"""The decision file format: what curation writes, and what everything else reads. Importing it does not load torch."""

from lightning_mimic.manifest.exports import EXPORTS, Export, checked_exports
from lightning_mimic.manifest.filter import KeptIds, kept_subset
from lightning_mimic.manifest.reader import Manifest
from lightning_mimic.manifest.writer import write_manifest, write_rows

__all__ = ["EXPORTS", "Export", "KeptIds", "Manifest", "checked_exports", "kept_subset", "write_manifest", "write_rows"]
