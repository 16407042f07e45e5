"""One file for each rule, ``csrc/rules/<rule>.h`` in Triton; kernels find it by its name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from functools import cached_property
from types import ModuleType

import triton.language as tl

# By its full name: tests import this folder a second time, for Triton's interpreter.
from fusedopt.backends.modules import compare
from fusedopt.backends.records import Record
from fusedopt.codecs import LOG8, LOG8_POSITIVE
from fusedopt.rules.declaration import OPTIONS_BYTES, Rule, State, declared

from ..tables import layout
from .common import Kind


class Text:
    """The functions and layouts of a rule, which kernels get as one constant argument.

    Triton uses the ``cache_key`` of an argument that has one. Kernels can call its functions.
    """

    def __init__(self, module: ModuleType, rule: Rule) -> None:
        self.name = rule.name
        self.prepare, self.variant, self.update = module.prepare, module.variant, module.update
        self.Hyper = module.Hyper
        # Wrapped one by one: before Triton 3.9 an attribute of a constant was no constant.
        self.options = tl.constexpr(layout(Record(**rule.options), OPTIONS_BYTES))
        row_step = Record(**dict.fromkeys((*rule.hyper, "count"), "f"))
        self.row_step = tl.constexpr(layout(row_step, rule.row_step_bytes))
        self.n_always = rule.n_always
        self.absent = tuple(state.absent for state in rule.states)
        self.codes = tuple(map(_codec_of_8_bits, rule.states))

    def __repr__(self) -> str:
        return self.name

    @cached_property
    def cache_key(self) -> str:
        """Everything of the rule that decides what is compiled; a kernel's own key lacks it."""
        functions = [f.cache_key for f in (self.prepare, self.variant, self.update)]
        layouts = (self.Hyper._fields, Kind._fields, self.options, self.row_step)
        return repr((self.name, *functions, *layouts, self.n_always, self.absent, self.codes))


def _codec_of_8_bits(state: State) -> int:
    """The number of the one that the state may have; 0: it is never stored in 8 bits."""
    if state.ratchets:
        return 0
    return (LOG8_POSITIVE if state.positive else LOG8).number


def check(module: ModuleType, rule: Rule) -> None:
    """Compare the names in the text, in their order, with those of the declaration.

    Raises:
        ImportError: they differ; names both fields.
    """
    options, states = [*rule.options], [state.name for state in rule.states]
    expected: dict[str, tuple[Iterable[str], list[str]]] = {
        "prepare": (module.prepare.arg_names, [*options, "step", "n_bits"]),
        "variant": (module.variant.arg_names, options),
        "update": (module.update.arg_names, ["h", "kind", "grad", "param", *states, "STATES"]),
        "Hyper": (module.Hyper._fields, [*rule.hyper]),
    }
    for where, (theirs, ours) in expected.items():
        compare(module, f"{where} of {rule.name}", zip(theirs), zip(ours))


def _read(name: str) -> Text:
    module, rule = importlib.import_module(f".{name}", __name__), declared(name)
    check(module, rule)
    return Text(module, rule)


_names = (module.name for module in pkgutil.iter_modules(__path__))
TEXTS = {name: _read(name) for name in sorted(_names) if name != "common"}
