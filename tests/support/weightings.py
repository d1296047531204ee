"""A weighting over several ranks, in one process."""

import copy

import torch

import lightning_mimic.scorers.weighting as weighting_module

FIGURES = ("ess", "temperature", "batch_size", "counted", "score_mean", "negative_share")


def over_ranks(monkeypatch, weighting, parts, valid):
    """What each rank gets; the ranks exchange rows one after the other, and each pass collects one row more of each.

    The weighting sees the last pass alone, of the first rank.
    """
    exchanges = []
    while True:
        sent, results = [], []
        for number, (part, mask) in enumerate(zip(parts, valid, strict=True)):
            answers = iter(exchanges)

            def exchange(row, answers=answers):
                stacked = next(answers, None)
                if stacked is None:
                    raise _UnansweredError(row)
                return stacked

            monkeypatch.setattr(weighting_module, "stack_over_ranks", exchange)
            own = copy.deepcopy(weighting)
            try:
                results.append(own(part, valid=mask))
            except _UnansweredError as row:
                sent.append(row.args[0])
            if number == 0:
                first = own
        if not sent:
            if hasattr(first, "state_dict"):
                weighting.load_state_dict(first.state_dict())
            return results
        exchanges.append(torch.stack(sent))


class _UnansweredError(Exception):
    """A row to be exchanged, which no other rank has answered yet."""
