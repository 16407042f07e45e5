"""docs/differences.md, migrating.md and troubleshooting.md name all that a program can list."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from raised_messages import raised

import fusedopt
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import OPTION_NAMES

DOCS = Path(__file__).parents[2] / "docs"
pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="the documents are not here")
TWINS = [(fusedopt.FusedAdamW, torch.optim.AdamW), (fusedopt.FusedSGD, torch.optim.SGD)]


def names_in(text: str) -> set[str]:
    """Identifiers in inline code."""
    return {name for code in re.findall(r"`([^`]+)`", text) for name in re.findall(r"\w+", code)}


def arguments(cls: type) -> dict[str, Any]:
    parameters = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    return {name: p.default for name, p in parameters.items() if name not in ("self", "params")}


def read(name: str) -> str:
    return (DOCS / name).read_text()


# ---- differences.md ------------------------------------------------------------------------------


@pytest.mark.parametrize("ours, theirs", TWINS, ids=lambda cls: cls.__name__)
def test_arguments_are_torchs_and_those_that_are_named(ours: type, theirs: type) -> None:
    """Of torch's we have names, order and defaults, which is what the page says of them."""
    mine, torchs = arguments(ours), arguments(theirs)
    assert mine.keys() - torchs.keys() == {*OPTION_NAMES, "decoupled_weight_decay"}
    assert [*mine][: len(torchs)] == [*torchs]
    assert {name: mine[name] for name in torchs} == torchs
    # those that choose an implementation, of which there is one
    implementations = {"foreach", "fused", "capturable", "differentiable"} & torchs.keys()
    own = mine.keys() - torchs.keys()
    assert own | implementations <= names_in(read("differences.md"))


def test_public_names_that_torch_has_not_are_named() -> None:
    own = {n for n in dir(FusedOptimizer) if not n.startswith("_")}
    own -= {*dir(torch.optim.Optimizer), "rule"}
    assert own <= names_in(read("differences.md"))


# What the steps of an optimizer refuse, by words of the message, and the page's word for it.
REFUSALS = {
    "differentiable=True is not supported": "`differentiable=True`",
    "cannot be honoured for FSDP1 shards": "FSDP1 shards",
    "cannot be honoured for one rank's share": "one rank's share in `ZeroRedundancyOptimizer`",
    "has no option": "None or a string in a group's option",
    "it holds for all groups": "an option of the whole optimizer in a param",
    "list each parameter once: ": "a parameter twice in a group",
    "not a list; use": "`param_groups` or `state` replaced",
    "is no dict with a list of params": "`param_groups` or `state` replaced",
    "not a tensor; take it out": "`param_groups` or `state` replaced",
    "starts all state anew": "`param_groups` or `state` replaced",
    "complex parameters": "complex, sparse or nested parameters",
    "sparse parameters": "complex, sparse or nested parameters",
    "nested parameters": "complex, sparse or nested parameters",
    "not a dict with a dict's own access": "a parameter's state that is no `dict`",
    "has no memory": "a parameter, state or gradient without memory",
    "storage was resized to nothing": "a parameter, state or gradient without memory",
    "parameter dtype … is not supported": "parameters of an integer or 8-bit dtype",
    "is not supported, its memory": "wrapper subclasses (float8, NF4), as parameter or gradient",
    "gradients of type … are not supported": "wrapper subclasses (float8, NF4), as parameter",
    "a parameter that is a partial sum": "a DTensor parameter that is a partial sum",
    "both have to be DTensors": "a plain gradient of a DTensor",
    "clear it after resharding": "a gradient that lies on another mesh than its parameter",
    "another rank refused this step": "a rank that fails in `step()`",
    "the ranks' options differ": "options that differ between ranks",
    "this step or one before it was refused": "a rank that fails in `step()`",
    "use True or False": "plain tensors beside DTensors",
    "is a plain tensor beside DTensors": "plain tensors beside DTensors",
    "norm_group has not all ranks of": "a `norm_group` without some ranks",
    "and norm_group has ranks outside of": "on a mesh that is no part of one",
    "lies on a smaller mesh": "DTensors on a smaller mesh than others",
    "and other parameters on other ranks": "DTensors on meshes of different ranks",
    "lies on a part of its mesh": "parameters on a part of a mesh",
    "has several dimensions and not all ranks": "a `norm_group` that this rank cannot use",
    "norm_group has no member on this rank": "a `norm_group` that this rank cannot use",
    "was pickled or copied, and its norm_group": "a pickled or copied optimizer that had a",
    "does not support sparse gradients": "sparse gradients",
    "does not go with parameter dtype": "a gradient of another dtype",
    "is not initialized; run a forward pass": "a lazy module's parameter",
    "is on the meta device": "a parameter on the meta device",
    "was made in inference mode": "a parameter or a state made in inference mode",
    "elements share memory": "an expanded parameter",
    "and … share memory": "parameters that share memory",
    "has shape …, the parameter has": "a state of another shape",
    "its state has … and lacks …": "a parameter's state that is there in part",
    "its state has …, which another": "a parameter's state that is there in part",
    "counts the steps of a group": "a parameter's state that is there in part",
    "not a plain tensor of floating-point numbers": "a state that is no plain tensor",
    "and has to be a number of steps": "a `step` that is NaN or negative",
    "JSON, for one, makes strings of keys": "a checkpoint whose keys became strings",
    "of a parameter before it": "groups name one key twice",
    "it is the checkpoint of another": "a checkpoint of another optimizer",
    "the checkpoint has no … of …": "a flattened load of `torch.distributed.checkpoint`",
    "in the checkpoint depend on": "a flattened load of `torch.distributed.checkpoint`",
    "it had no state for torch.distributed": "a flattened load of `torch.distributed.checkpoint`",
    "is not supported for parameters of FSDP1": 'state_dtype="8bit"` for parameters of FSDP1',
    "a form for bf16 alone": '"dither"` for an fp16 parameter',
    "keeps its state in float64": "a `state_dtype` for a float64 one",
    "scales of torch.uint8": "codes without their scales",
    "make it whole, on all ranks": "a state on another mesh than its parameter",
}
# The same in torch: a gradient always has its parameter's shape and device, a state dict is a dict.
AS_IN_TORCH = (
    "clear it after replacing the parameter's data",
    "state of one parameter must be a dict",
    "changed while step() was preparing",
)


def test_every_refusal_is_named() -> None:
    text = read("differences.md")
    assert [word for word in REFUSALS.values() if word not in text] == []
    checking = ("checks.py", "exchange.py", "groups.py", "rows.py", "shards.py", "state.py")
    messages = set(raised("optimizer.py", "loadable.py", "plan.py", *checking)) - {"…"}
    known = (*REFUSALS, *AS_IN_TORCH)
    assert [m for m in sorted(messages) if not any(words in m for words in known)] == []
    assert [words for words in known if not any(words in m for m in messages)] == []


# ---- migrating.md --------------------------------------------------------------------------------

# Arguments of the other packages' constructors, as their sources have them.
ADAM = ("lr", "betas", "eps", "weight_decay", "amsgrad", "bias_correction")
SGD = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "wd_after_momentum")
OTHERS = {
    ("Apex", "FusedAdam"): (*ADAM, "adam_w_mode", "set_grad_none", "capturable", "master_weights"),
    ("Apex", "FusedSGD"): (*SGD, "materialize_master_grads", "set_grad_none"),
    ("TransformerEngine", "FusedAdam"): (
        *(*ADAM, "adam_w_mode", "capturable", "master_weights", "master_weight_dtype"),
        *("exp_avg_dtype", "exp_avg_sq_dtype", "use_decoupled_grad", "store_param_remainders"),
        "set_grad_none",
    ),
    ("TransformerEngine", "FusedSGD"): (*SGD, "materialize_master_grads", "set_grad_none"),
    ("DeepSpeed", "FusedAdam"): (*ADAM, "adam_w_mode", "set_grad_none"),
    ("DeepSpeed", "DeepSpeedCPUAdam"): (*ADAM, "adamw_mode", "fp32_optimizer_states"),
}


def section(package: str) -> str:
    text = read("migrating.md")
    return text[text.index(f"## From {package}") :].partition("\n## ")[0]


@pytest.mark.parametrize("package, cls", OTHERS)
def test_arguments_of_other_packages_are_named(package: str, cls: str) -> None:
    """Each is in the section, or has its name and its meaning here."""
    ours = fusedopt.FusedSGD if cls == "FusedSGD" else fusedopt.FusedAdamW
    same = arguments(ours).keys() - {"weight_decay", "capturable", "amsgrad", "master_weights"}
    text = section(package)
    assert cls in names_in(text)
    assert [a for a in OTHERS[package, cls] if a not in same | names_in(text)] == []


# ---- troubleshooting.md --------------------------------------------------------------------------

# Raised, and not looked for by anybody.
OF_NO_USER = {
    "… row kinds than params": "called by our own plan alone",
    "… is neither True nor False": "the same",
    "… is not a number": "the same",
    "…": "repeats the message of check_param",
}


def listed() -> list[str]:
    """The messages in the first column; of torch's own, what torch says is torch's business."""
    cells = re.findall(r"^\| (`.*?) \|", read("troubleshooting.md"), re.MULTILINE)
    ours = [cell for cell in cells if not cell.endswith("(torch's)")]
    return [message for cell in ours for message in re.findall(r"`([^`]+)`", cell)]


def test_messages_listed_are_those_that_are_raised() -> None:
    entries, texts = listed(), set(raised())
    assert len(entries) > 30 and len(entries) == len(set(entries))
    missing = [one for one in entries if not any(one in text for text in texts)]
    native = sorted((DOCS.parent / "csrc").rglob("*.cpp"))  # a user meets one sentence of these
    said = "".join(path.read_text() for path in native)
    assert [one for one in missing if one not in said][0 if native else 1 :] == []
    assert {t for t in texts if not any(one in t for one in entries)} == OF_NO_USER.keys()
