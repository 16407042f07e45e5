"""An optimizer's groups and state, and what may happen to them between two steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import transposed
from harness import make_param, randn
from torch import Tensor

from fusedopt.backends.records import AWAITS_STATE, READY, STAGED


class Scene:
    """Groups and state of an optimizer, with a row of every kind."""

    def __init__(self) -> None:
        matrix, image = randn((5, 3), 1), randn((2, 3, 4, 5), 2, torch.float16)
        self.matrix = make_param(matrix)
        self.image = make_param(image.to(memory_format=torch.channels_last))
        self.scalar = make_param(randn((), 3))
        self.column = make_param(randn((4, 1), 4, torch.bfloat16))
        self.empty = make_param(randn((0, 3), 5))
        self.gaps = make_param(randn((4, 6), 6)[:, ::2])
        self.new = make_param(randn((7,), 7))
        self.params = [self.matrix, self.image, self.scalar, self.column]
        self.params += [self.empty, self.gaps, self.new]
        self.kinds = [READY] * 5 + [STAGED, AWAITS_STATE]
        self.groups: Any = [
            {"params": self.params[:3], "lr": 0.1},
            {"params": self.params[3:], "lr": 0.2},
        ]
        self.state: Any = {
            p: {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(p.detach()), "note": 1}
            for p in self.params[:-1]
        }
        del self.state[self.image]["note"]
        self.state["of the whole optimizer"] = 3.0
        for seed, param in enumerate(self.params[:-1]):
            self.give(param, seed)
        self.gaps.grad = randn((4, 6), 8)[:, ::2]

    @staticmethod
    def give(param: Tensor, seed: int = 9, dtype: torch.dtype | None = None) -> None:
        param.grad = torch.empty_like(param, dtype=dtype).copy_(randn(param.shape, seed))

    @property
    def own(self) -> dict[str, Any]:
        """State of the matrix."""
        own: dict[str, Any] = self.state[self.matrix]
        return own


# Situations that the plan goes on with.


def nothing(s: Scene) -> None:
    pass


def new_gradients(s: Scene) -> None:
    for seed, param in enumerate(s.params[:-1]):
        s.give(param, 50 + seed)


def none_gradient(s: Scene) -> None:
    s.scalar.grad = None


def no_gradients(s: Scene) -> None:
    for param in s.params:
        param.grad = None


def half_gradients(s: Scene) -> None:
    s.give(s.matrix, dtype=torch.float16)
    s.give(s.scalar, dtype=torch.bfloat16)
    s.give(s.column, dtype=torch.float32)


def float64_gradient(s: Scene) -> None:
    s.give(s.matrix, dtype=torch.float64)


def transposed_gradient(s: Scene) -> None:
    s.matrix.grad = transposed(s.matrix.grad)


def contiguous_gradient_of_channels_last(s: Scene) -> None:
    s.image.grad = s.image.grad.contiguous()


def expanded_gradient(s: Scene) -> None:
    s.matrix.grad = torch.ones(()).expand(5, 3)


def gradient_with_any_stride_over_one_element(s: Scene) -> None:
    s.column.grad = s.column.grad.as_strided((4, 1), (1, 77))


def gradient_of_another_shape(s: Scene) -> None:
    s.matrix.grad.data = torch.ones(4, 3)  # as torch itself would refuse


def sparse_gradient(s: Scene) -> None:
    s.matrix.grad = s.matrix.grad.to_sparse()


class Marked(Tensor):
    pass


def gradient_of_a_subclass(s: Scene) -> None:
    s.matrix.grad = s.matrix.grad.as_subclass(Marked)


def gradient_that_is_a_parameter(s: Scene) -> None:
    s.matrix.grad = torch.nn.Parameter(s.matrix.grad)


def negated_gradient(s: Scene) -> None:
    s.scalar.grad = torch.imag(torch.conj(torch.tensor(1 + 2j)))
    assert s.scalar.grad.is_neg() and s.scalar.grad.dtype == torch.float32


def zeros_without_memory(s: Scene) -> None:
    s.matrix.grad = torch._efficientzerotensor(5, 3)


def odd_in_many_ways(s: Scene) -> None:
    sparse_gradient(s)
    contiguous_gradient_of_channels_last(s)
    negated_gradient(s)
    s.column.grad = None


def param_with_any_stride_over_one_element(s: Scene) -> None:
    s.column.data = s.column.data.as_strided((4, 1), (1, 55))


def state_with_any_stride_over_one_element(s: Scene) -> None:
    entry = s.state[s.column]["exp_avg"]
    entry.data = entry.data.as_strided((4, 1), (1, 55))


def memory_there_and_back(s: Scene) -> None:
    before = s.matrix.data
    s.matrix.data = before.clone()
    s.matrix.data = before


def in_place_writes(s: Scene) -> None:
    with torch.no_grad():
        s.matrix.mul_(2.0)
        s.own["step"].add_(1)
        s.own["exp_avg"].fill_(3.0)


def hyper_parameters(s: Scene) -> None:
    s.groups[0]["lr"] = 0.7
    s.groups[1]["betas"] = (0.1, 0.2)


def equal_lists_of_the_same_params(s: Scene) -> None:
    s.groups = [{**group, "params": tuple(group["params"])} for group in s.groups]


# The rows whose gradient is odd (the staged one always is), and how many have none.
KEPT: dict[Callable[[Scene], None], tuple[list[int], int]] = {
    nothing: ([5], 1),
    new_gradients: ([5], 1),
    none_gradient: ([5], 2),
    no_gradients: ([], 7),
    half_gradients: ([5], 1),
    float64_gradient: ([0, 5], 1),
    transposed_gradient: ([0, 5], 1),
    contiguous_gradient_of_channels_last: ([1, 5], 1),
    expanded_gradient: ([0, 5], 1),
    gradient_with_any_stride_over_one_element: ([5], 1),
    gradient_of_another_shape: ([0, 5], 1),
    sparse_gradient: ([0, 5], 1),
    gradient_of_a_subclass: ([0, 5], 1),
    gradient_that_is_a_parameter: ([5], 1),
    negated_gradient: ([2, 5], 1),
    zeros_without_memory: ([0, 5], 1),
    odd_in_many_ways: ([0, 1, 2, 5], 2),
    param_with_any_stride_over_one_element: ([5], 1),
    state_with_any_stride_over_one_element: ([5], 1),
    memory_there_and_back: ([5], 1),
    in_place_writes: ([5], 1),
    hyper_parameters: ([5], 1),
    equal_lists_of_the_same_params: ([5], 1),
}


# Situations in which the plan describes the optimizer no more.


def param_elsewhere(s: Scene) -> None:
    s.matrix.data = s.matrix.data.clone()


def param_with_other_strides(s: Scene) -> None:
    s.matrix.data = s.matrix.data.as_strided((5, 3), (1, 5))
    s.matrix.grad = None


def param_of_another_shape(s: Scene) -> None:
    s.matrix.data = s.matrix.data.view(3, 5)
    s.matrix.grad = None


def param_of_fewer_rows(s: Scene) -> None:
    s.matrix.data = s.matrix.data[:4]
    s.matrix.grad = None


def param_of_another_dtype(s: Scene) -> None:
    s.column.data = s.column.data.view(torch.float16)
    s.column.grad = None


def param_without_memory(s: Scene) -> None:
    """As FSDP does between two uses."""
    s.matrix.untyped_storage().resize_(0)


def first_gradient(s: Scene) -> None:
    s.give(s.new)


def another_param(s: Scene) -> None:
    s.groups[0]["params"][0] = make_param(s.matrix.detach())


def fewer_params(s: Scene) -> None:
    s.groups[1]["params"].pop()


def more_params(s: Scene) -> None:
    s.groups[1]["params"].append(make_param(randn(3, 1)))


def other_order(s: Scene) -> None:
    s.groups[0]["params"].reverse()


def param_in_another_group(s: Scene) -> None:
    s.groups[1]["params"].insert(0, s.groups[0]["params"].pop())


def more_groups(s: Scene) -> None:
    s.groups.append({"params": []})


def fewer_groups(s: Scene) -> None:
    s.groups.pop()


def groups_of_no_list(s: Scene) -> None:
    s.groups = tuple(s.groups)


def group_without_params(s: Scene) -> None:
    del s.groups[1]["params"]


def group_with_a_set_of_params(s: Scene) -> None:
    s.groups[1]["params"] = set(s.groups[1]["params"])


def another_state(s: Scene) -> None:
    s.state = dict(s.state)


def no_state(s: Scene) -> None:
    s.state.clear()


def state_of_no_dict(s: Scene) -> None:
    s.state = list(s.state.items())


def another_entry(s: Scene) -> None:
    s.state[s.matrix] = dict(s.own)


def entry_gone(s: Scene) -> None:
    del s.state[s.scalar]


def entry_come(s: Scene) -> None:
    s.state[s.new] = {}


def entries_in_another_order(s: Scene) -> None:
    s.state[s.matrix] = s.state.pop(s.matrix)


def entry_under_another_key(s: Scene) -> None:
    s.state["of all"] = s.state.pop("of the whole optimizer")


def another_value_that_is_no_entry(s: Scene) -> None:
    s.state["of the whole optimizer"] = 4.0


def state_replaced(s: Scene) -> None:
    s.own["exp_avg"] = s.own["exp_avg"].clone()


def state_gone(s: Scene) -> None:
    del s.own["exp_avg"]


def state_come(s: Scene) -> None:
    s.own["exp_avg_sq"] = torch.ones(5, 3)


def state_renamed(s: Scene) -> None:
    s.own["momentum_buffer"] = s.own.pop("exp_avg")
    s.own["note"] = s.own.pop("note")


def states_in_another_order(s: Scene) -> None:
    s.own["step"] = s.own.pop("step")


def state_in_another_entry(s: Scene) -> None:
    """What all entries hold together is the same, in the same order."""
    image = s.state[s.image]
    before = dict(image)
    image.clear()
    image["note"] = s.own.pop("note")
    image.update(before)


def number_replaced(s: Scene) -> None:
    s.own["note"] = 2


def state_elsewhere(s: Scene) -> None:
    s.own["exp_avg"].data = torch.zeros(5, 3)


def state_with_other_strides(s: Scene) -> None:
    s.own["exp_avg"].data = s.own["exp_avg"].data.as_strided((5, 3), (1, 5))


def state_of_another_dtype(s: Scene) -> None:
    s.own["exp_avg"].data = s.own["exp_avg"].data.view(torch.int32)


REBUILT = [param_elsewhere, param_with_other_strides, param_of_another_shape, param_of_fewer_rows]
REBUILT += [param_of_another_dtype, param_without_memory, first_gradient, another_param]
REBUILT += [fewer_params, more_params, other_order, param_in_another_group, more_groups]
REBUILT += [fewer_groups, groups_of_no_list, group_without_params, group_with_a_set_of_params]
REBUILT += [another_state, no_state, state_of_no_dict, another_entry, entry_gone, entry_come]
REBUILT += [entries_in_another_order, entry_under_another_key, another_value_that_is_no_entry]
REBUILT += [state_replaced, state_gone, state_come, state_renamed, states_in_another_order]
REBUILT += [state_in_another_entry, number_replaced, state_elsewhere, state_with_other_strides]
REBUILT += [state_of_another_dtype]
