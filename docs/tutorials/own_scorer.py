# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Write a scorer of your own
#
# A scorer is a formula of a few products with the samples' gradients. It declares which products it needs; the package finds the
# cheapest way to compute them. This tutorial writes one that the package does not have, and tests it against a computation that is
# obviously right.
#
# The score is the step's gain per unit of its own length: the mimic score divided by the root of the gradient's norm. It lies between
# the mimic score and its cosine.

# %%
import torch
from torch import nn

from lightning_mimic import Reweighter


class RootScore:
    needs = frozenset({"dot", "norms"})  # ⟨gᵢ, v⟩ and ‖gᵢ‖, both of shape (B,)

    def __call__(self, products):
        return -products.dot / (products.direction_norm * products.norms.sqrt())


# %% [markdown]
# ## Use it
#
# `Reweighter` is the engine behind the callback; `GradMimic(scorer=RootScore())` works the same way.

# %%
torch.manual_seed(0)
model = nn.Linear(4, 3)
reference = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
inputs, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])

with Reweighter(model, reference, "all", scorer=RootScore(), diagnose_reference=False) as reweighter:
    with reweighter.step((inputs, labels)) as step:
        x, y = step.batch
        result = step.backward(nn.functional.cross_entropy(model(x), y))
print(result.scores)

# %% [markdown]
# ## Compare it with one backward pass per sample

# %%
expected = []
for x, y in zip(inputs, labels, strict=True):
    loss = nn.functional.cross_entropy(model(x[None]), y[None])
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    v = torch.cat([(reference[name] - tensor).flatten() for name, tensor in model.state_dict().items()])
    expected.append(-(gradient @ v) / (v.norm() * gradient.norm().sqrt()))
torch.testing.assert_close(result.scores, torch.stack(expected).detach())
print("equal to one backward pass per sample")

# %% [markdown]
# The products that exist, weightings of your own, and rules for layers that the package does not know are in
# [extending](../contributing/extending.md).
