"""Modules that the callback must refuse, each for one reason."""

from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from support.toys import Toy, WithLosses


class L2(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + 0.1 * self.body.weight.square().sum()


class InPlace(Toy):
    def forward(self, x):
        return self.head(torch.tanh(self.body(x))).relu_()


class ClassWeighted(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.cross_entropy(self(x), y, weight=torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype))


class Ignoring(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.cross_entropy(self(x), y, ignore_index=int(y[0]))


class Summed(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="sum")


class Reentrant(Toy):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x.requires_grad_(), use_reentrant=True)


class TakesIterator(Toy):
    def training_step(self, dataloader_iter: Any) -> Any:
        return super().training_step(*next(dataloader_iter)[:2])


class Penalised(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch[0].clone().requires_grad_()
        return (
            F.cross_entropy(self(x), batch[1])
            + torch.autograd.grad(self(x).sum(), x, create_graph=True)[0].square().mean()
        )


class LeavesOutLater(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1], ignore_index=int(batch[1][0]) if batch_idx else -100)


class BypassesLater(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        return F.cross_entropy(self.body(batch[0])[:, :3] if batch_idx else logits, batch[1])


class ChangedInput(Toy):
    def forward(self, x):
        hidden = torch.tanh(self.body(x)).detach()  # nothing else needs it, so autograd would not object
        out = F.linear(hidden, self.head.weight.detach() * 0) + self.head(hidden)
        hidden.mul_(2)
        return out


class Bypassed(Toy):
    def forward(self, x):
        self.head(torch.tanh(self.body(x)))
        return self.body(x)[:, :3]


class NotAveraged(WithLosses):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        losses = self.sample_losses(batch)
        return (losses * torch.arange(len(losses))).mean()


class NotCalled(WithLosses):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return Toy.training_step(self, batch, batch_idx)


class ByHand(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Quasi(Toy):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())
