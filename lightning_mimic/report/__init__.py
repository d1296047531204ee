"""Reports: web page and notebook views of a manifest's decisions and samples."""

from lightning_mimic.report.facts import ManifestFacts, Shown
from lightning_mimic.report.held_views import Views, first_rows, held_views
from lightning_mimic.report.notebook import Inline, manifest_view
from lightning_mimic.report.page import NAMES, Courses, render_page
from lightning_mimic.report.samples import HasSamples, Render, View, default_render, views
from lightning_mimic.report.viewers import fiftyone_samples, write_spotlight

__all__ = [
    "NAMES",
    "Courses",
    "HasSamples",
    "Inline",
    "ManifestFacts",
    "Render",
    "Shown",
    "View",
    "Views",
    "default_render",
    "fiftyone_samples",
    "first_rows",
    "held_views",
    "manifest_view",
    "render_page",
    "views",
    "write_spotlight",
]
