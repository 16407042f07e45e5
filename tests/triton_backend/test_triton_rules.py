"""One table of cases for both texts of the rules: csrc/rules.h, and triton_kernels/rules.py.

And the texts themselves, side by side: what is changed in one of them alone shows here, also where
no case of the table would.
"""

from __future__ import annotations

import ast
import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import triton_interpreter
from cpp_rules import CSRC, in_cpp
from numpy.typing import NDArray

f32 = np.float32
Array = NDArray[Any]

# ---- the texts ----------------------------------------------------------------------------------

FUNCTIONS = [  # in C++, and in Triton; in the order of both files
    ("clipped", "clipped"),
    ("geometric_sum", "geometric_sum"),
    ("AdamW::row_scalars", "adamw_row_scalars"),
    ("AdamW::decay", "decay_kind"),
    ("AdamW::hyper", "adamw_hyper"),
    ("AdamW::update", "adamw_update"),
    ("SGD::row_scalars", "sgd_row_scalars"),
    ("SGD::hyper", "sgd_hyper"),
    ("SGD::update", "sgd_update"),
]
# These say the same in other words, which only the table below can compare.
IN_OTHER_WORDS = {"AdamW::decay", "SGD::row_scalars"}
BOOKKEEPING = {"bit", "odd"}  # of the loop in geometric_sum
Statement = tuple[str, list[str]]  # the name that is assigned, or "return"; the words of the value


def words(value: str) -> list[str]:
    """Names, numbers and operators in order, without casts and prefixes.

    ``a ? b : c`` and ``tl.where(a, b, c)`` are then the same, and so are ``-b`` and ``(-b)``.
    """
    value = value.replace("row.momentum", "buffer_momentum").replace(", n_bits)", ")")
    value = value.replace("-1.0 * ", "-")  # Triton 3.6 and 3.7 take -x for 0 - x, which is never -0
    value = re.sub(r"!= 0(\.0)?\b", "", value)  # how Triton says that a flag is set
    value = re.sub(r"\b(tl|h|o|row)\.|\bh_|static_cast<\w+>|\.to\(tl\.\w+\)", "", value)
    value = re.sub(r"_rn\b|(?<=\d)f\b", "", value).replace("||", "|")
    found = re.findall(r"[a-z_]\w*|\d[\d.]*|[-+*/|]|[<>=!]=|[<>]", value)
    return [word for word in found if word != "where"]


@functools.cache
def cpp_functions() -> dict[str, str]:
    """Bodies by name, in order."""
    text = re.sub(r"//.*", "", (CSRC / "rules.h").read_text())
    found: dict[str, str] = {}
    struct = ""
    for match in re.finditer(r"(?m)^struct (\w+) \{|FUSEDOPT_FN [\w ]+?(\w+)\([^)]*\) \{", text):
        if match[1]:
            struct = f"{match[1]}::"
            continue
        end = match.end()
        while text[match.end() : end].count("{") >= text[match.end() : end].count("}"):
            end += 1
        found[struct + match[2]] = text[match.end() : end - 1]
    return found


def cpp_statements(body: str) -> list[Statement]:
    statements = []
    for text in re.split(r";|\{\n|\}\n", " ".join(body.split(" "))):
        text = " ".join(text.split())
        text = re.sub(r"^(if|while|for) \((?:[^()]|\([^()]*\))*\)+ ?", "", text)
        if match := re.fullmatch(r"return (.*)", text):
            statements.append(("return", words(match[1])))
        elif match := re.fullmatch(r"(?:[\w ]+ )?(\w+) = (.*)", text):
            statements.append((match[1], words(match[2])))
    return statements


@functools.cache
def triton_functions() -> dict[str, ast.FunctionDef]:
    text = (triton_interpreter.PACKAGE / "rules.py").read_text()
    return {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


def triton_statements(function: ast.FunctionDef) -> list[Statement]:
    statements: list[tuple[int, Statement]] = []
    for node in ast.walk(function):
        if isinstance(node, ast.Return) and node.value is not None:
            statements.append((node.lineno, ("return", words(ast.unparse(node.value)))))
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, ast.unparse(node.value)
            if match := re.fullmatch(rf"tl\.where\(odd, (.*), {name}\)", value):
                value = match[1]  # in C++ under an `if`
            value = re.sub(r"tl\.full\(t\.shape, (.*), tl\.float64\)", r"\1", value)
            statements.append((node.lineno, (name, words(value))))
    return [statement for _, statement in sorted(statements, key=lambda entry: entry[0])]


def test_the_functions_are_the_same() -> None:
    decays = {name: body for name, body in cpp_functions().items() if name.endswith("::decay")}
    assert len(set(decays.values())) == 1  # and in Triton they are one function
    decays.pop("AdamW::decay")
    in_cpp = [name for name in cpp_functions() if name not in decays]
    assert [*zip(in_cpp, triton_functions(), strict=True)] == FUNCTIONS


@pytest.mark.parametrize(("in_cpp", "in_triton"), FUNCTIONS)
def test_the_statements_are_the_same(in_cpp: str, in_triton: str) -> None:
    def kept(statements: list[Statement]) -> list[Statement]:
        results = {"return"} if in_cpp.endswith("update") else set()  # C++ has references for them
        return [s for s in statements if s[0] not in BOOKKEEPING | results]

    ours = kept(cpp_statements(cpp_functions()[in_cpp]))
    theirs = kept(triton_statements(triton_functions()[in_triton]))
    assert ours and theirs
    if in_cpp not in IN_OTHER_WORDS:
        assert theirs == ours


# ---- both texts at work -------------------------------------------------------------------------


def in_triton(function: str, *arguments: Any) -> Any:
    pytest.importorskip("triton")
    rules = triton_interpreter.part("rules")
    return triton_interpreter.call(getattr(rules, function), *arguments)


def assert_same(ours: Array, theirs: Array, where: Callable[[int], Any]) -> None:
    """To the bit; any NaN for any other."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    integer = np.int32 if ours.dtype == np.float32 else np.int64
    same = (ours.view(integer) == theirs.view(integer)) | (np.isnan(ours) & np.isnan(theirs))
    wrong = np.flatnonzero(~same)
    assert wrong.size == 0, f"{where(wrong[0])}: {ours[wrong[0]]!r} and {theirs[wrong[0]]!r}"


# ---- the table ----------------------------------------------------------------------------------

TINY = 2.0**-149
MOST = float(np.finfo(np.float32).max)
PLAIN = [1.0, -0.3, 7.1, 0.62]
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, TINY, -3 * TINY, 2.0**-126, MOST, -MOST, 1e-20,
           3e19, 1 + 2.0**-23]  # fmt: skip
STATES = [0.0, -0.0, 0.7, -1e-30, 5 * TINY, 3e38, math.inf, math.nan]
STEPS = [1, 2, 3, 10, 1000, 123457, 2**24]
LRS = [(0.02, 0.1), (0.0, 0.3), (1e30, 0.0), (-0.5, 1e10), (1e-42, -0.1)]  # lr, weight_decay
BETAS = [(0.9, 0.999), (0.0, 0.0), (0.5, 0.95), (0.499999999, 1 - 1e-9), (0.99999, 0.3)]
EPS = [1e-8, 0.0, 1e-40, 0.1]
MOMENTA = [(0.0, 0.0), (0.9, 0.0), (0.6, 0.4), (1.0, 1.0), (1e-42, -3.0)]  # momentum, dampening


def values() -> tuple[Array, ...]:
    """Gradients, params and two states, in every combination."""
    both = PLAIN + SPECIAL
    table = np.array(list(itertools.product(both, both, STATES, STATES)), np.float32)
    return tuple(np.ascontiguousarray(column) for column in table.T)


def test_geometric_sum() -> None:
    """Also of what beta rounds to: one, and its neighbours."""
    bases = [0.0, 2.0**-149, 0.1, 0.5, 0.9, 0.999, 1 - 2.0**-24, 1.0, 1 + 2.0**-23, -0.5, math.nan]
    steps = sorted({*range(70), *(2**k + d for k in range(7, 53) for d in (-1, 0, 1))})
    b, t = (np.array(column) for column in zip(*itertools.product(bases, steps), strict=True))
    ours = np.empty_like(b)
    in_cpp("sums", b.size, b, t, ours)
    for n_bits in (int(t.max()).bit_length(), 63):  # leading zeros change nothing
        theirs = in_triton("geometric_sum", b, t, np.int32(n_bits))
        assert_same(ours, theirs, lambda i: f"b={b[i]!r}, t={t[i]}")
    small = (t <= 64) & (b <= 1) & (b >= 0)
    sums = [sum(x**k for k in range(int(n))) for x, n in zip(b[small], t[small], strict=True)]
    np.testing.assert_allclose(ours[small], sums, rtol=1e-13)


def test_clipped() -> None:
    grad = np.array(PLAIN + SPECIAL, np.float32)
    for mult, most in itertools.product(PLAIN + SPECIAL, [0.0, 0.3, 1e-40, MOST, math.inf]):
        ours = np.empty_like(grad)
        in_cpp("clip", grad.size, grad, f32(mult), f32(most), ours)
        theirs = in_triton("clipped", grad, f32(mult), f32(most))
        assert_same(ours, theirs, lambda i, at=(mult, most): f"{grad[i]!r}, {at}")


def hypers(rule: str) -> tuple[Array, Array, list[Any]]:
    """Every combination of options and steps: rows as C++ has them, as Triton has, the options."""
    own = [(*b, e) for b in BETAS for e in EPS] if rule == "adamw" else [(*m, 0.0) for m in MOMENTA]
    options = [
        (*lr, *rest, decoupled, t)
        for lr, rest, decoupled, t in itertools.product(LRS, own, (0, 1), STEPS)
    ]
    lr, weight_decay, a, b, eps, decoupled, t = (
        np.array(column) for column in zip(*options, strict=True)
    )
    doubles = [lr, weight_decay, a, b, eps] if rule == "adamw" else [lr, weight_decay, a, b]
    unused = [np.zeros_like(t)] * (7 - len(doubles))
    packed = np.stack([*(d.view(np.int64) for d in doubles), decoupled, *unused], 1)
    ours = np.empty((len(options), 8 if rule == "adamw" else 6), np.float32)
    in_cpp(f"{rule}_hypers", len(options), packed.copy(), t, ours)
    if rule == "adamw":
        n_bits = np.int32(int(t.max()).bit_length())
        row = in_triton("adamw_row_scalars", lr, a, b, eps, t, n_bits)
        theirs = in_triton("adamw_hyper", lr, weight_decay, a, b, decoupled, *row)
    else:
        row = in_triton("sgd_row_scalars", a, b, t)
        theirs = in_triton("sgd_hyper", lr, weight_decay, a, decoupled, *row)
    kind = in_triton("decay_kind", weight_decay, decoupled).astype(np.float32)
    return ours, np.stack([*theirs, kind], 1), options


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_hypers(rule: str) -> None:
    ours, theirs, options = hypers(rule)
    for column in range(ours.shape[1]):
        assert_same(
            ours[:, column].copy(), theirs[:, column].copy(), lambda i, c=column: (c, options[i])
        )


@functools.cache
def few_hypers(rule: str) -> list[Array]:
    """Of all kinds of decay, with which the rules are run."""
    all_of_them = hypers(rule)[0]
    picked = all_of_them[:: 1 + len(all_of_them) // 11]
    assert len({row[-1] for row in picked}) == 3, "not every kind of decay"
    return list(picked)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adamw_update(amsgrad: bool) -> None:
    table = values()
    for hyper in few_hypers("adamw"):
        grad, *ours = (column.copy() for column in (*table, table[3][::-1]))
        h, decay = hyper[:7].copy(), int(hyper[7])
        theirs = in_triton("adamw_update", tuple(h), np.int32(decay), grad, *ours, amsgrad)
        in_cpp("adamw_update", grad.size, h, decay, amsgrad, grad, *ours)
        for name, a, b in zip(("param", "exp_avg", "exp_avg_sq", "max"), ours, theirs, strict=True):
            assert_same(a, b, lambda i, n=name, h=hyper: (n, h, [c[i] for c in table]))


@pytest.mark.parametrize(("momentum", "nesterov"), [(0, 0), (1, 0), (1, 1)])
def test_sgd_update(momentum: int, nesterov: int) -> None:
    table = values()[:3]
    for hyper in few_hypers("sgd"):
        grad, *ours = (column.copy() for column in table)
        h, decay = hyper[:5].copy(), int(hyper[5])
        flags = (np.bool_(momentum), np.bool_(nesterov))
        theirs = in_triton("sgd_update", tuple(h), np.int32(decay), *flags, grad, *ours)
        in_cpp("sgd_update", grad.size, h, decay, bool(momentum), bool(nesterov), grad, *ours)
        for name, a, b in zip(("param", "momentum_buffer"), ours, theirs, strict=True):
            assert_same(a, b, lambda i, n=name, h=hyper: (n, h, [c[i] for c in table]))
