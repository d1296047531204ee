"""Hooks and wrappers that a fit could leave on a module."""

import torch


def untouched(module: torch.nn.Module) -> bool:
    """Whether a module has no hook and no method of its own instance."""
    hooks = [m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in module.modules()]
    hooks += [p._backward_hooks for p in module.parameters()]
    return not any(hooks) and not {"training_step", "sample_losses"} & vars(module).keys()


def traces(module):
    """Everything that a fit could have left on a module, its modes included."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    left = [(name, h) for name, part in module.named_modules() for h in hooks if getattr(part, h)]
    left += [name for name, p in module.named_parameters() if p._backward_hooks or p._post_accumulate_grad_hooks]
    left += sorted({"configure_optimizers", "training_step", "sample_losses", "forward"} & vars(module).keys())
    modes = {name: part.training for name, part in module.named_modules()}
    return left, modes, {name: p.requires_grad for name, p in module.named_parameters()}
