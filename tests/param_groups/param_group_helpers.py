"""The decision of fusedopt.param_groups for each parameter, by its name."""

from __future__ import annotations

from torch import nn

import fusedopt


def names_without_decay(model: nn.Module, **options: bool) -> set[str]:
    """Names the decision for each parameter, and checks that every parameter has just one."""
    groups = fusedopt.param_groups(model, 0.1, **options)
    listed = [id(param) for group in groups for param in group["params"]]
    assert sorted(listed) == sorted(id(param) for param in model.parameters())
    without = {id(p) for group in groups if group["weight_decay"] == 0.0 for p in group["params"]}
    return {name for name, param in model.named_parameters() if id(param) in without}
