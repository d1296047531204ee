"""Messages that several checks share."""

ELSEWHERE = (
    "`parameters`: the output of {0!r} has shape {1}, and its first axis is not that of the {2} samples, although it "
    "is as long. Use another batch size, or name a later layer."
)

HOOKED = (
    "`parameters`: {} carry gradient hooks of their own, which would change the scores or undo the weights. Remove "
    "the hooks, or leave these parameters out."
)

MEANT_NAN = (
    "samples of the batch hold NaN, and the module looks for NaN itself (isnan, isfinite, nan_to_num ...), so that "
    "they may be meant, as targets that were not measured. Choose `on_nonfinite='mask_loss'`, which leaves the batch "
    "as it is, or `on_nonfinite='mask'`, which takes these samples out."
)

NOT_CROSS_ENTROPY = (
    "the loss was a cross-entropy of the last layer's outputs with one class per sample at the start of the epoch, and "
    "is no longer (mixed labels, ignored ones or another loss in some batches), so that labels are not known. Take a "
    "scorer or weighting that does not need them."
)

NOT_PLAIN = (
    "the loss is not shown to be a plain mean over samples: {}. Give the module a method `sample_losses(batch)` that "
    "returns one loss per sample, and average it in training_step; or, if the loss is the plain mean of losses of "
    "which each is a sample's own, assert that with `loss='mean'`."
)

OTHERWISE = (
    "the loss of this batch was computed by other operations than those that were followed at the start of the epoch, "
    "so it is not shown to be a plain mean over samples. Give the module a method `sample_losses(batch)` that returns "
    "one loss per sample, and average it in training_step; or, if every loss is the plain mean of losses of which each "
    "is a sample's own, assert that with `loss='mean'`."
)

UNEQUAL_TARGETS = (
    "the loss averages over targets, and samples have different numbers of them (ignore_index), so that it is not a "
    "plain mean over samples. Average each sample's own targets first:\n"
    "    def sample_losses(self, batch):\n"
    "        logits = self(batch['input_ids'])\n"
    "        return lightning_mimic.token_losses(logits[:, :-1], batch['labels'][:, 1:])  # shifted: a language model\n"
    "    def training_step(self, batch, batch_idx):\n"
    "        return self.sample_losses(batch).mean()"
)

NOT_THE_MEAN = (
    "training_step does not return the plain mean of `self.sample_losses(batch)`; weights, ignored targets and "
    "regularisers belong inside `sample_losses`, or in a term of their own."
)

REORDERED = (
    "training_step puts the samples in another order, or takes some of them, before they are scored, so that scores "
    "would be recorded under other samples' ids: row i of the batch must be sample i throughout the step. Sort or "
    "filter in the data set or in the `collate_fn`, before ids are given; or bring the rows back into the batch's "
    "order before the scored layer (`rows[order.argsort()]`)."
)

SEVERAL_PASSES = (
    "the optimizer runs its closure more than once per batch (LBFGS, SAM); the weights of a batch hold for one pass. "
    "Use an optimizer with one pass."
)

COMPILED_TWICE = (
    "`parameters`: scoring these takes a second reverse pass, which torch.compile leaves no room for. Name the last "
    "layer alone, or do not compile the module."
)

UNSCORED = (
    "`keep_output_gradients` forms the gradients of the scored parameters, and the loss reaches others, too: {}. Score "
    "all trainable parameters with `parameters='all'`, or leave `keep_output_gradients` out."
)

NORMALISED = (
    "`keep_output_gradients`: a batch normalisation in training mode lies between scored parameters and the loss, "
    "through which a sample's weight reaches the gradients of others; the sum of weighted gradients of samples lacks "
    "that. Leave `keep_output_gradients` out."
)

RECOMPUTED = (
    "`keep_output_gradients` keeps a gradient for every activation, and layers run again in the backward pass "
    "(activation checkpointing) so that less is kept. Leave one of the two out."
)

UNKEPT = (
    "`keep_output_gradients` saves arithmetic where several layers are scored in a reverse pass of their own, and here "
    "the scores come from {}. Leave it out."
)

SHARDED = (
    "`parameters`: the model is sharded (`fully_shard`), and these are not the one last layer that is scored within "
    "the backward pass: several layers, a layer that is called several times, or one that the loss reaches other "
    "parameters around. Name the last layer alone, or give the module a method `sample_losses(batch)` that returns one "
    "loss per sample, from which any parameter can be scored."
)
