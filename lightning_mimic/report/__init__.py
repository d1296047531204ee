"""The report: a page that shows what a manifest decides, and the samples behind it."""

from lightning_mimic.report.page import report

__all__ = ["report"]
