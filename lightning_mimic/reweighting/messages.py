"""Messages that several checks share."""

COMPILED = (
    "a part of the module is compiled, so it cannot be seen whether the samples' losses depend on each other; they are "
    "taken for independent."
)

HOOKED = (
    "`parameters`: {} carry gradient hooks of their own, which would change the scores or undo the weights. Remove "
    "the hooks, or leave these parameters out."
)

NOT_PLAIN = (
    "the loss cannot be taken for a plain mean over samples: {}. Give the module a method `sample_losses(batch)` that "
    "returns one loss per sample, and average it in training_step."
)

NOT_THE_MEAN = (
    "training_step does not return the plain mean of `self.sample_losses(batch)`; weights, ignored targets and "
    "regularisers belong inside `sample_losses`, or in a term of their own."
)

SEVERAL_PASSES = (
    "the optimizer runs its closure more than once per batch (LBFGS, SAM); the weights of a batch hold for one pass. "
    "Use an optimizer with one pass."
)

COMPILED_TWICE = (
    "`parameters`: scoring these takes a second reverse pass, which torch.compile leaves no room for. Name the last "
    "layer alone, or do not compile the module."
)
