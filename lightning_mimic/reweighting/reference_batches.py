"""Reference batches of a scorer's own loader, and the descent direction on each of them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mimic import distributed
from lightning_mimic.batches import sample_count
from lightning_mimic.errors import MimicError, join_names
from lightning_mimic.gradients import GradientDirection
from lightning_mimic.random_streams import torch_generator
from lightning_mimic.reference.diagnose import isolated_rng
from lightning_mimic.reweighting.messages import HOOKED


class ReferenceBatches:
    """Iterate over a scorer's own loader during training, one batch for every scored micro-batch.

    Training is unaffected: the module is in evaluation mode for the pass, no gradients are accumulated, and random
    numbers come from separate generators. Every rank iterates over its loader; the gradients are averaged over the
    samples of all ranks. A host sync per scored batch checks that the gradient is finite.

    Args:
        loader: Loader of batches that ``sample_losses`` accepts; the ``set_epoch`` of its sampler is called with the
            index of the pass.
        module: Module that is trained.
        targets: Target parameters by name, including frozen ones.
        scorer: Name of the scorer, for messages.
        prepare: Function that moves a batch to the module's device and precision.

    Raises:
        MimicError: Target parameters carry gradient hooks of other code, which would change the gradients.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        module: nn.Module,
        targets: Mapping[str, nn.Parameter],
        scorer: str,
        prepare: Callable[[Any], Any],
    ) -> None:
        if hooked := [name for name, parameter in targets.items() if parameter._backward_hooks]:
            raise MimicError(HOOKED.format(join_names(hooked)))
        self._loader = loader
        self._module = module
        self._targets = dict(targets)
        self._scorer = scorer
        self._prepare = prepare
        self._device = next(module.parameters()).device
        #: Direction of a descent step on the current batch.
        self.direction = GradientDirection()
        self._go_to(0, 0)

    def advance(self) -> None:
        """Update the direction from the next batch. Must be called on every rank.

        Raises:
            ValueError: The loader is empty, or the batch's losses are not one per sample or do not depend on the target
                parameters.
            FloatingPointError: The gradient is not finite.
        """
        with isolated_rng(self._device):
            sums, rows = self._gradients(self._next())
        for each in (*sums.values(), rows):
            distributed.sum_over_ranks(each)
        self.direction.update({name: each / rows for name, each in sums.items()})
        if not bool(torch.isfinite(self.direction.norm())):
            raise FloatingPointError(
                f"batch {self._taken - 1} of the `loader` of {self._scorer} has losses or gradients that are not "
                "finite, so samples cannot be compared with it. Remove samples that hold NaN from the loader, or lower "
                "the learning rate if the model has diverged."
            )

    def state_dict(self) -> dict[str, int]:
        """Return the index of the current pass and the number of batches taken from it."""
        return {"passes": self._passes, "taken": self._taken}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from a state: the batches taken before are drawn again and skipped."""
        with isolated_rng(self._device):
            self._go_to(state["passes"], state["taken"])

    def _go_to(self, passes: int, taken: int) -> None:
        self._passes, self._taken = passes, 0
        set_epoch = getattr(getattr(self._loader, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(passes)
        self._batches: Iterator[Any] | None = None
        for _ in range(taken):
            self._draw()
            self._taken += 1

    def _draw(self) -> list[Any]:
        """Return a list with the next batch of this pass; an empty list at its end."""
        # Seed the CPU generator per draw, so that order and transforms are the same after a resume.
        stream = torch_generator(0, "reference batches", self._passes, self._taken)
        torch.default_generator.set_state(stream.get_state())
        if self._batches is None:
            self._batches = iter(self._loader)
        return list(islice(self._batches, 1))

    def _next(self) -> Any:
        drawn = self._draw()
        if not drawn and self._taken:
            self._go_to(self._passes + 1, 0)
            drawn = self._draw()
        if not drawn:
            raise MimicError(f"the `loader` of {self._scorer} gave no batch; expected at least one batch per pass.")
        self._taken += 1
        return drawn[0]

    def _gradients(self, batch: Any) -> tuple[dict[str, Tensor], Tensor]:
        """Return the sum of the gradients of this rank's samples, in float32 or higher, and the number of samples."""
        module, scorer = self._module, self._scorer
        batch = self._prepare(batch)
        with (
            evaluating(module, self._targets),
            torch.enable_grad(),
            torch.autocast(self._device.type, enabled=False),
        ):
            losses = module.sample_losses(batch)  # type: ignore[operator]
            rows = sample_count(batch) or len(losses)
            if losses.shape not in (
                (rows,),
                (rows * distributed.world_size(),),
            ):  # with a contrastive loss, each rank has the losses of all ranks
                raise MimicError(
                    f"`sample_losses` returned shape {tuple(losses.shape)} for {rows} samples of the `loader` of "
                    f"{scorer}; expected one loss per sample."
                )
            if not losses.requires_grad:
                raise MimicError(
                    f"the losses of the `loader` of {scorer} do not depend on {join_names(list(self._targets))}; name "
                    "parameters that `sample_losses` uses."
                )
            found = torch.autograd.grad(
                losses.sum(), list(self._targets.values()), allow_unused=True, materialize_grads=True
            )
        sums = {
            name: gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            for name, gradient in zip(self._targets, found, strict=True)
        }
        return sums, torch.tensor(float(rows), device=self._device)


@contextmanager
def evaluating(module: nn.Module, targets: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Put every submodule in evaluation mode and enable gradients for the target parameters only, within a block."""
    modes = [(part, part.training) for part in module.modules()]
    needs = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    wanted = {id(parameter) for parameter in targets.values()}
    try:
        for part, _ in modes:
            part.training = False
        for parameter, _ in needs:
            parameter.requires_grad = id(parameter) in wanted
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        for parameter, needed in needs:
            parameter.requires_grad = needed
