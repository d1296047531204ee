"""Sentences that more than one place says."""

COMPILED = (
    "a part of the module is compiled, so it cannot be seen whether the samples' losses depend on each other; they are "
    "taken for independent."
)

HOOKED = (
    "`parameters`: {} carry gradient hooks of their own, which would change what is scored or undo the weights. Remove "
    "them, or leave these parameters out."
)

NOT_PLAIN = (
    "the loss cannot be taken for a plain mean over samples: {}. Give the module a method `sample_losses(batch)` that "
    "returns one loss per sample, and average it in training_step."
)

NOT_THE_MEAN = (
    "training_step does not return the plain mean of `self.sample_losses(batch)`; weights, ignored targets and "
    "regularisers belong inside `sample_losses`, or in a term of their own."
)
