"""Hydra's configuration, one object per file; installed as ``lightning_mimic.conf``."""
