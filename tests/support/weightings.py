"""A weighting over several ranks, in one process."""

import torch

import lightning_mimic.scorers.weighting as weighting_module

FIGURES = ("ess", "temperature", "batch_size", "counted", "score_mean", "negative_share")


def over_ranks(monkeypatch, weighting, parts, valid):
    """What each rank gets: a first pass collects what the ranks send, a second answers with all of it."""
    sent = []
    monkeypatch.setattr(weighting_module, "stack_over_ranks", lambda row: sent.append(row) or row[None])
    for part, mask in zip(parts, valid, strict=True):
        weighting(part, valid=mask)
    monkeypatch.setattr(weighting_module, "stack_over_ranks", lambda row: torch.stack(sent))
    return [weighting(part, valid=mask) for part, mask in zip(parts, valid, strict=True)]
