"""One table of cases for both texts of every rule: csrc/rules, and triton_kernels/rules.

And the texts themselves, side by side: what is changed in one of them alone shows here, also where
no case of the table would. Rules are found by their files, so that a new one needs no line here.
"""

from __future__ import annotations

import ast
import copy
import ctypes
import functools
import itertools
import math
import re
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import triton_interpreter
from cpp_library import CSRC, compiled
from numpy.typing import NDArray

from fusedopt.backends import records
from fusedopt.rules.declaration import Rule, declared

f32 = np.float32
Array = NDArray[Any]

# ---- the texts ----------------------------------------------------------------------------------

RULES = sorted(path.stem for path in (CSRC / "rules").glob("*.h") if path.stem != "common")
# What a rule's declaration says, and the drivers' own.
IN_CPP_ALONE = {"states", "absent", "row_step"}
# These say the same in other words, which only the table below can compare.
IN_OTHER_WORDS = {("sgd", "variant")}
# Results by references in C++.
BY_REFERENCE = {"apply_decay", "update"}
BOOKKEEPING = {"bit", "odd"}  # of the loop in geometric_sum
Statement = tuple[str, list[str]]  # the name that is assigned, or "return"; the words of the value


def words(value: str) -> list[str]:
    """Names, numbers and operators in order, without casts and prefixes.

    ``a ? b : c`` and ``tl.where(a, b, c)`` are then the same, and so are ``-b`` and ``(-b)``.
    """
    value = re.sub(r"\b(decay_factor|variant)\([\w, ]*\)", r"\1", value)  # of the same options
    value = value.replace(", n_bits)", ")")
    value = value.replace("-1.0 * ", "-")  # Triton 3.6 and 3.7 take -x for 0 - x, which is never -0
    value = re.sub(r"!= 0(\.0)?\b|bits_of", "", value)  # how they say that a flag is set
    value = re.sub(r"\b(tl|h|o)\.|\b(Decay|R)::|static_cast<\w+>|\.to\(tl\.\w+\)", "", value)
    value = re.sub(
        r"\bk([A-Z]\w*)|\b([A-Z][A-Z\d_]+)\b", lambda m: m[0][m[1] is not None :].lower(), value
    )
    value = re.sub(r"\b(Hyper|Kind)\b|_rn\b|(?<=\d)f\b", "", value).replace("||", "|")
    found = re.findall(r"[a-z_]\w*|\d[\d.]*|[-+*/|]|[<>=!]=|[<>]", value)
    return [word for word in found if word != "where"]


def cpp_functions(name: str) -> dict[str, str]:
    """Bodies by name, in order."""
    text = re.sub(r"//.*", "", (CSRC / f"rules/{name}.h").read_text())
    found: dict[str, str] = {}
    for match in re.finditer(r"FUSEDOPT_FN [\w<> ]+?(\w+)\([^)]*\) \{", text):
        end = match.end()
        while text[match.end() : end].count("{") >= text[match.end() : end].count("}"):
            end += 1
        found[match[1]] = text[match.end() : end - 1]
    return {name: body for name, body in found.items() if name not in IN_CPP_ALONE}


def triton_functions(name: str) -> dict[str, ast.FunctionDef]:
    text = (triton_interpreter.PACKAGE / f"rules/{name}.py").read_text()
    return {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


def statements(texts: Iterable[str]) -> list[Statement]:
    """Assignments, results, and calls that assign to several or by reference."""
    found = []
    for text in texts:
        text = re.sub(r"^(if|while|for) \((?:[^()]|\([^()]*\))*\)+ ?", "", " ".join(text.split()))
        pattern = r"return (.*)|(?:[\w ]+ )?(\w+) = (.*)|(?:[\w, ]+ = )?(\w+\(.*\))"
        if match := re.fullmatch(pattern, text):
            name = match[2] or ("return" if match[1] else "call")
            found.append((name, words(match[1] or match[3] or match[4])))
    return found


def cpp_statements(body: str) -> list[Statement]:
    return statements(re.split(r";|\{\n|\}\n", body))


def triton_statements(function: ast.FunctionDef) -> list[Statement]:
    nodes = [node for node in ast.walk(function) if isinstance(node, (ast.Assign, ast.Return))]
    texts = [ast.unparse(node) for node in sorted(nodes, key=lambda node: node.lineno)]
    texts = [re.sub(r"tl\.full\(t\.shape, (.*), tl\.float64\)", r"\1", text) for text in texts]
    # in C++ under an `if`
    return statements(re.sub(r"tl\.where\(odd, (.*), \w+\)", r"\1", text) for text in texts)


@pytest.mark.parametrize("name", ["common", *RULES])
def test_the_statements_are_the_same(name: str) -> None:
    in_cpp, in_triton = cpp_functions(name), triton_functions(name)
    assert [*in_cpp] == [*in_triton]
    for function in in_cpp:
        skipped = BOOKKEEPING | ({"return"} if function in BY_REFERENCE else set())
        ours = [s for s in cpp_statements(in_cpp[function]) if s[0] not in skipped]
        theirs = [s for s in triton_statements(in_triton[function]) if s[0] not in skipped]
        assert ours and theirs, function
        assert theirs == ours or (name, function) in IN_OTHER_WORDS, function


# ---- both texts at work -------------------------------------------------------------------------

HARNESS = """
#include <cstring>
#include <utility>
#include "rules.h"
using namespace fusedopt;

template <class Visit>
void with_rule(const char* name, const Visit& visit) {
  for (int rule = 0; rule < Rules::kCount; ++rule)
    Rules::with(rule, [&](auto tag) {
      if (!std::strcmp(name, decltype(tag)::Rule::kName)) visit(tag);
    });
}

struct Elements {
  int64_t n;
  const float* grad;
  float *param, *const *state;
};

template <class R, int kThere, size_t... k>
void update_elements(const float* h, Kind kind, Elements e, std::index_sequence<k...>) {
  typename R::Hyper hyper;
  std::memcpy(&hyper, h, sizeof hyper);
  for (int64_t i = 0; i < e.n; ++i)
    R::template update<kThere>(hyper, kind, e.grad[i], e.param[i], e.state[k][i]...);
}

template <class R, int kThere>
void update_with(int states, const float* h, Kind kind, Elements e) {
  using All = std::make_index_sequence<R::kStates>;
  if (states == kThere) update_elements<R, kThere>(h, kind, e, All());
  if constexpr (kThere < R::kStates) update_with<R, kThere + 1>(states, h, kind, e);
}

extern "C" {
void clip(int64_t n, const float* g, float mult, float most, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = clipped(g[i], mult, most);
}
void sums(int64_t n, const double* b, const int64_t* t, double* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = geometric_sum(b[i], t[i]);
}
// kAlways, kVariants, and then what absent states read as
void constants(int64_t n, const char* rule, float* out) {
  with_rule(rule, [&](auto tag) {
    using R = typename decltype(tag)::Rule;
    *out++ = R::kAlways;
    *out++ = R::kVariants;
    for (int s = 0; s < R::kStates; ++s) *out++ = R::absent(s);
  });
}
void hypers(int64_t n, const char* rule, const void* options, const int64_t* t, float* out) {
  with_rule(rule, [&](auto tag) {
    using R = typename decltype(tag)::Rule;
    for (int64_t i = 0; i < n; ++i) {
      const auto& o = static_cast<const typename R::Options*>(options)[i];
      const auto h = R::prepare(o, t[i]);
      std::memcpy(out, &h, sizeof h);
      out += sizeof h / sizeof *out;
      *out++ = float(kind_of<R>(o).decay);
      *out++ = float(kind_of<R>(o).variant);
    }
  });
}
void update(int64_t n, const char* rule, int states, const float* h, int decay, int variant,
            const float* g, float* p, float* const* s) {
  with_rule(rule, [&](auto tag) {
    update_with<typename decltype(tag)::Rule, 0>(states, h, {Decay(decay), variant}, {n, g, p, s});
  });
}
}
"""
library = functools.cache(lambda: compiled(HARNESS))


def in_cpp(function: str, n: int, *arguments: Any) -> None:
    converted = {np.float32: ctypes.c_float, int: ctypes.c_int, str: lambda a: a.encode()}
    arrays = {np.ndarray: lambda a: ctypes.c_void_p(a.ctypes.data), list: _addresses}
    made = [{**converted, **arrays}[type(a)](a) for a in arguments]
    getattr(library(), function)(ctypes.c_int64(n), *made)


def _addresses(arrays: list[Any]) -> Any:
    return (ctypes.c_void_p * max(len(arrays), 1))(*(a.ctypes.data for a in arrays))


def in_triton(function: str, *arguments: Any, part: str = "rules.common") -> Any:
    pytest.importorskip("triton")
    module = triton_interpreter.part(part)
    return triton_interpreter.call(getattr(module, function), *arguments)


def assert_same(what: Any, ours: Array, theirs: Array, *inputs: Array) -> None:
    """To the bit; any NaN for any other."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    integer = np.int32 if ours.dtype == np.float32 else np.int64
    bits, other_bits = (np.ascontiguousarray(values).view(integer) for values in (ours, theirs))
    wrong = np.flatnonzero((bits != other_bits) & ~(np.isnan(ours) & np.isnan(theirs)))
    of_first = [column[wrong[:1]] for column in (*inputs, ours, theirs)]
    assert wrong.size == 0, f"{what}: {of_first}"


# ---- the table ----------------------------------------------------------------------------------

TINY = 2.0**-149
MOST = float(np.finfo(np.float32).max)
PLAIN = [1.0, -0.3, 7.1, 0.62]
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, TINY, -3 * TINY, 2.0**-126, MOST, -MOST, 1e-20,
           3e19, 1 + 2.0**-23]  # fmt: skip
STATES = [0.0, -0.0, 0.7, -1e-30, 5 * TINY, 3e38, math.inf, math.nan]
STEPS = [1, 2, 3, 10, 1000, 123457, 2**24]
LRS = [0.02, 0.0, 1e30, -0.5, 1e-42]
DECAYS = [0.1, 0.3, 0.0, 1e10, -0.1]
NUMBERS = [0.0, 0.9, 0.999, 0.5, 0.95, 0.499999999, 1 - 1e-9, 0.99999, 0.3, 1.0, 0.6, 1e-8, 1e-40,
           0.1, 1e-42, -3.0]  # fmt: skip
ROWS = 20_000  # of options


def values(n_states: int) -> list[Array]:
    """Gradients, params and two states, in every combination; of more states, again the second."""
    both = PLAIN + SPECIAL
    table = np.array(list(itertools.product(both, both, STATES, STATES)), np.float32)
    columns = [*table.T, *(table.T[3][:: -1 if k % 2 else 1] for k in range(1, n_states - 1))]
    return [np.ascontiguousarray(column) for column in columns[: 2 + n_states]]


def test_geometric_sum() -> None:
    """Also of what beta rounds to: one, and its neighbours."""
    bases = [0.0, 2.0**-149, 0.1, 0.5, 0.9, 0.999, 1 - 2.0**-24, 1.0, 1 + 2.0**-23, -0.5, math.nan]
    steps = sorted({*range(70), *(2**k + d for k in range(7, 53) for d in (-1, 0, 1))})
    b, t = (np.array(column) for column in zip(*itertools.product(bases, steps), strict=True))
    ours = np.empty_like(b)
    in_cpp("sums", b.size, b, t, ours)
    for n_bits in (int(t.max()).bit_length(), 63):  # leading zeros change nothing
        theirs = in_triton("geometric_sum", b, t, np.int32(n_bits))
        assert_same("sum", ours, theirs, b, t)
    small = (t <= 64) & (b <= 1) & (b >= 0)
    sums = [sum(x**k for k in range(int(n))) for x, n in zip(b[small], t[small], strict=True)]
    np.testing.assert_allclose(ours[small], sums, rtol=1e-13)


def test_clipped() -> None:
    grad = np.array(PLAIN + SPECIAL, np.float32)
    for mult, most in itertools.product(PLAIN + SPECIAL, [0.0, 0.3, 1e-40, MOST, math.inf]):
        ours = np.empty_like(grad)
        in_cpp("clip", grad.size, grad, f32(mult), f32(most), ours)
        theirs = in_triton("clipped", grad, f32(mult), f32(most))
        assert_same((mult, most), ours, theirs, grad)


def table_of(rule: Rule) -> tuple[list[Array], Array]:
    """Options of every kind, column by column, and steps."""
    rng = np.random.default_rng(0)
    pools = {"lr": LRS, "weight_decay": DECAYS}
    columns = [
        rng.choice(pools.get(name, NUMBERS) if kind == "d" else [0, 1], ROWS)
        for name, kind in rule.options.items()
    ]
    return columns, rng.choice(STEPS, ROWS)


@functools.cache
def hypers(name: str) -> tuple[Array, Array]:
    """Hyper, decay and variant of each row of the table: of C++, and of Triton."""
    rule = declared(name)
    columns, t = table_of(rule)
    words = [column.view(np.int64) for column in columns]
    words += [np.zeros(ROWS, np.int64)] * (8 - len(words))
    ours = np.empty((ROWS, len(rule.hyper) + 2), np.float32)
    in_cpp("hypers", ROWS, name, np.stack(words, 1).copy(), t, ours)
    n_bits = np.int32(int(t.max()).bit_length())
    theirs = in_triton("prepare", *columns, t, n_bits, part=f"rules.{name}")
    variant = in_triton("variant", *columns, part=f"rules.{name}")
    kind = in_triton("kind_of", columns[1], columns[2], variant)
    return ours, np.stack([*theirs, *(number.astype(np.float32) for number in kind)], 1)


@pytest.mark.parametrize("name", RULES)
def test_hypers(name: str) -> None:
    ours, theirs = hypers(name)
    columns, t = table_of(declared(name))
    for k in range(ours.shape[1]):
        assert_same(k, ours[:, k], theirs[:, k], *columns, t)


@pytest.mark.parametrize("name", RULES)
def test_constants(name: str) -> None:
    """The declaration's, from which the Triton kernels take them."""
    rule = declared(name)
    found = np.empty(2 + len(rule.states), np.float32)
    in_cpp("constants", 0, name, found)
    n_variants = len(np.unique(hypers(name)[0][:, -1]))
    assert found[:2].tolist() == [rule.n_always, n_variants]
    absent = [state.absent for state in rule.states]  # of one that is always there nobody asks
    assert found[2 + rule.n_always :].tolist() == absent[rule.n_always :]


def few_hypers(name: str) -> list[Array]:
    """Of all kinds of decay and all variants, with which the rules are run."""
    rows = hypers(name)[0]
    kinds = np.unique(rows[:, -2:], axis=0)
    assert len(set(kinds[:, 0])) == 3, "not every kind of decay"
    picked = [rows[(rows[:, -2:] == kind).all(1)][:3] for kind in kinds]
    return [row for some in picked for row in some]


NUMBERS_OF_STATES = [
    (name, n)
    for name in RULES
    for n in range(declared(name).fewest_states, len(declared(name).states) + 1)
]


@pytest.mark.parametrize(("name", "n_states"), NUMBERS_OF_STATES)
def test_update(name: str, n_states: int) -> None:
    rule = declared(name)
    table = values(len(rule.states))
    names = ("param", *(state.name for state in rule.states))
    pytest.importorskip("triton")
    text, common = (triton_interpreter.part(f"rules.{part}") for part in (name, "common"))
    for row in few_hypers(name):
        grad, *ours = (column.copy() for column in table)
        h, decay, variant = row[:-2].copy(), int(row[-2]), int(row[-1])
        kind = common.Kind(np.int32(decay), np.int32(variant))
        theirs = in_triton(
            "update", text.Hyper(*h), kind, grad, *ours, n_states, part=f"rules.{name}"
        )
        param, *states = ours
        in_cpp("update", grad.size, name, n_states, h, decay, variant, grad, param, states)
        for what, a, b in zip(names, ours, theirs, strict=True):
            assert_same((what, row), a, b, *table)


# ---- a text and its declaration -----------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_other_names_or_another_order_are_refused(name: str) -> None:
    pytest.importorskip("triton")
    rules, rule = triton_interpreter.part("rules"), declared(name)
    text = triton_interpreter.part(f"rules.{name}")
    rules.check(text, rule)
    functions = ("prepare", "variant", "update")
    good: dict[str, Any] = {f: {"arg_names": getattr(text, f).arg_names} for f in functions}
    good["Hyper"] = {"_fields": text.Hyper._fields}
    for where, value in good.items():
        ((attribute, (first, second, *rest)),) = value.items()
        wrong = {
            f"has {second}, fusedopt has {first}": [second, first, *rest],
            "has more, fusedopt has nothing": [first, second, *rest, "more"],
            f"has nothing, fusedopt has {[second, *rest][-1]}": [first, second, *rest][:-1],
        }
        for message, names in wrong.items():
            changed = {**good, where: {attribute: names}}
            parts = {part: SimpleNamespace(**own) for part, own in changed.items()}
            with pytest.raises(ImportError, match=f"{where} of {name}.*{message}"):
                rules.check(SimpleNamespace(__name__="text", **parts), rule)


def test_every_part_of_a_text_tells_binaries_apart() -> None:
    """Else a text that was changed would be served by the binary of the old one, from the cache."""
    pytest.importorskip("triton")
    from triton.compiler import ASTSource

    from fusedopt.triton_kernels.kernels import finalize_kernel
    from fusedopt.triton_kernels.rules import TEXTS

    text, other = TEXTS["sgd"], TEXTS["adamw"]
    parts = {name: getattr(other, name) for name in vars(text) if name != "cache_key"}
    hashes = set()
    for name, value in [("name", text.name), *parts.items()]:
        changed = copy.copy(text)
        vars(changed).pop("cache_key", None)
        setattr(changed, name, value)
        source = ASTSource(finalize_kernel, {"RULE": "constexpr"}, constexprs={"RULE": changed})
        hashes.add(source.hash())
    assert len(hashes) == 1 + len(parts)


def test_every_record_tells_binaries_apart() -> None:
    """Triton looks at what a kernel's constants print."""
    pytest.importorskip("triton")
    from fusedopt.triton_kernels import kernels, tables

    printed = set()
    for kernel in (kernels.reduce_kernel, kernels.finalize_kernel, kernels.update_kernel):
        assert kernel.cache_key
        printed |= {str(value) for value, _ in kernel.used_global_vals.values()}
    layouts = [value for value in vars(tables).values() if "Layout(" in str(value)]
    assert len(layouts) == len(records.RECORDS) and {*map(str, layouts)} <= printed
    for layout, record in zip(layouts, records.RECORDS.values(), strict=True):
        name, offset, *_ = record.fields[-1]
        assert f"{name!r})" in str(layout) and f"{offset})" in str(layout)
        assert f"size={record.size}" in str(layout)
