"""What torch's operations read and write, by their schemas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WRITE_ONLY = ("aten::copy_", "aten::_foreach_copy_")


class Bytes(TorchDispatchMode):
    """Adds up what operations read and write of tensors of at least ``least`` elements.

    What an operation is given it reads, but for the target of a copy, and once where it is given
    it twice; it writes its results and what its schema says. The schema of the fused optimizers
    does not say whether gradients are written: there it counts whether bits have changed.
    """

    def __init__(self, least: int) -> None:
        super().__init__()
        self.total, self._least = 0, least

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = self._arguments(func, args, kwargs or {})
        before = [[tensor.clone() for tensor in tensors] for _, tensors in given]
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result
        name, known = func._schema.name, set()
        for (argument, tensors), old in zip(given, before, strict=True):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if not (is_written and name in WRITE_ONLY):
                self.total += sum(size(t) for t in tensors if t.data_ptr() not in known)
            if is_written and name.startswith("aten::_fused"):
                is_written = not all(map(torch.equal, tensors, old))
            if is_written:
                self.total += sum(map(size, tensors))
            known |= {tensor.data_ptr() for tensor in tensors}
        if "empty" not in name:
            new = [tensor for tensor in self._large(result) if tensor.data_ptr() not in known]
            self.total += sum(map(size, new))
        return result

    def _arguments(self, func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
        """The arguments of the schema that are tensors or lists of them."""
        schema = func._schema.arguments
        values = [
            kwargs.get(a.name, args[i] if i < len(args) else None) for i, a in enumerate(schema)
        ]
        return [(a, list(self._large(v))) for a, v in zip(schema, values, strict=True)]

    def _large(self, tree: Any) -> Iterator[Tensor]:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor) and leaf.numel() >= self._least:
                yield leaf


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
