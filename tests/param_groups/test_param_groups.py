"""Which parameters decay: each rule alone, tied weights, norms by their names; none is lost."""

from __future__ import annotations

import pytest
import torch
from param_group_helpers import names_without_decay
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fusedopt


class MyRMSNorm(nn.Module):
    """A norm torch does not know, with a weight of two dimensions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, width))


class DerivedNorm(MyRMSNorm):
    pass


class Gain(MyRMSNorm):
    """Its own name says nothing; that of the class it derives from does."""


class NormedLinear(nn.Linear):
    """A linear layer with normalised rows: a weight like any other."""


class PreNorm(nn.Module):
    """Wraps a layer; the layer's weight is not the norm's."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.norm = layer, nn.LayerNorm(width)


def with_parameters(**params: torch.Tensor) -> nn.Module:
    model = nn.Module()
    for name, value in params.items():
        model.register_parameter(name, nn.Parameter(value))
    return model


def owner(name: str, *bases: type[nn.Module]) -> nn.Module:
    """A module of a class of this name, with a weight of two dimensions."""
    module = type(name, bases or (nn.Module,), {})()
    module.weight = nn.Parameter(torch.ones(2, 2))
    return module


SQUARE = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Linear(3, 2), {"bias"}),
        (nn.Conv2d(1, 2, 3), {"bias"}),
        (nn.LSTM(3, 2), {"bias_ih_l0", "bias_hh_l0"}),
        (nn.PReLU(4), {"weight"}),
        (nn.LayerNorm((3, 4)), {"weight", "bias"}),
        (nn.BatchNorm2d(3), {"weight", "bias"}),
        (nn.GroupNorm(1, 3), {"weight", "bias"}),
        (nn.InstanceNorm1d(3, affine=True), {"weight", "bias"}),
        (nn.RMSNorm((3, 4)), {"weight"}),
        (MyRMSNorm(3), {"weight"}),
        (DerivedNorm(3), {"weight"}),
        (Gain(3), {"weight"}),
        (NormedLinear(3, 2), {"bias"}),
        (PreNorm(nn.Linear(3, 3), 3), {"layer.bias", "norm.weight", "norm.bias"}),
        (nn.Embedding(5, 3), set()),
        (nn.ParameterDict({"scale": torch.ones(()), "table": torch.ones(2, 2)}), {"scale"}),
        # of three dimensions, and a bias
        (
            nn.MultiheadAttention(4, 2, add_bias_kv=True),
            {"in_proj_bias", "out_proj.bias", "bias_k", "bias_v"},
        ),
        # a bias by a word of the name, and not by a part of one
        (with_parameters(unbiased=SQUARE, bias1=SQUARE, BIAS=SQUARE), {"bias1", "BIAS"}),
        (
            with_parameters(biasTable=SQUARE, inProjBias=SQUARE, position_bias_table=SQUARE),
            {"biasTable", "inProjBias", "position_bias_table"},
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_which_parameters_decay(model: nn.Module, expected: set[str]) -> None:
    assert names_without_decay(model) == expected


@pytest.mark.parametrize("embedding", [nn.Embedding(5, 3), nn.EmbeddingBag(5, 3)])
def test_embeddings_on_request(embedding: nn.Module) -> None:
    assert names_without_decay(embedding, decay_embeddings=True) == set()
    assert names_without_decay(embedding, decay_embeddings=False) == {"weight"}


def with_3d_bias() -> nn.Module:
    model = with_parameters(bias=torch.ones(2, 1, 1))
    return parametrize.register_parametrization(model, "bias", nn.Identity())


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            parametrizations.weight_norm(nn.Embedding(5, 3)),
            {"weight.original0", "weight.original1"},
        ),
        (parametrizations.spectral_norm(nn.EmbeddingBag(5, 3)), {"weight.original"}),
        (parametrizations.spectral_norm(nn.RMSNorm((3, 4))), {"weight.original"}),
        (parametrizations.weight_norm(nn.Linear(3, 2, bias=False)), set()),
        (parametrizations.orthogonal(NormedLinear(3, 2, bias=False)), set()),
        (with_3d_bias(), {"bias.original"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_originals_count_as_what_they_parametrize(model: nn.Module, expected: set[str]) -> None:
    expected = {f"parametrizations.{name}" for name in expected}
    assert names_without_decay(model, decay_embeddings=False) == expected
    within = names_without_decay(nn.Sequential(nn.ReLU(), model), decay_embeddings=False)
    assert within == {f"1.{name}" for name in expected}
    if isinstance(model, nn.Embedding | nn.EmbeddingBag):
        assert names_without_decay(model, decay_embeddings=True) == set()


def test_modules_that_are_only_called_parametrizations() -> None:
    model = nn.Module()
    model.parametrizations = nn.ModuleDict({"bias": nn.Linear(2, 2, bias=False)})
    assert names_without_decay(model) == set()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("convert", ["script", "trace"])
@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_a_scripted_module_is_split_like_its_original(convert: str, decay_embeddings: bool) -> None:
    layers = [nn.Embedding(5, 4), nn.LayerNorm((3, 4)), nn.RMSNorm((3, 4))]
    named = ("RMSNorm", "Layernorm", "NormalizingFlow", "LayerNormMLP")
    layers += [owner(name, nn.Identity) for name in named]
    model = nn.Sequential(*layers, NormedLinear(4, 2))
    inputs = [torch.zeros(2, 3, dtype=torch.int64)] if convert == "trace" else []
    expected = names_without_decay(model, decay_embeddings=decay_embeddings)
    scripted = getattr(torch.jit, convert)(model, *inputs)
    assert names_without_decay(scripted, decay_embeddings=decay_embeddings) == expected
    weights = {f"{i}.weight" for i in range(1 if decay_embeddings else 0, 5)}
    assert expected == weights | {"1.bias", "7.bias"}


@pytest.mark.parametrize("reverse", [True, False])
def test_a_tied_weight_follows_the_owner_that_wants_no_decay(reverse: bool) -> None:
    embedding, norm, linear = nn.Embedding(7, 4), MyRMSNorm(3), nn.Linear(3, 1, bias=False)
    head = nn.Linear(4, 7, bias=False)
    head.weight, linear.weight = embedding.weight, norm.weight
    model = nn.Sequential(
        *([head, linear, embedding, norm] if reverse else [embedding, norm, head, linear])
    )
    assert names_without_decay(model) == {"1.weight"}
    assert names_without_decay(model, decay_embeddings=False) == {"0.weight", "1.weight"}


def test_one_parameter_under_two_names_of_one_module() -> None:
    model = with_parameters(weight=SQUARE)
    model.bias = model.weight
    assert names_without_decay(model) == {"weight"}


def test_a_module_used_twice_is_listed_once() -> None:
    layer = nn.Linear(2, 2)
    assert names_without_decay(nn.Sequential(layer, layer)) == {"0.bias"}


def test_order_and_values() -> None:
    model = nn.Sequential(
        nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 5), nn.Linear(5, 5, bias=False)
    )
    decayed, undecayed = fusedopt.param_groups(model, 0.25)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.25, 0.0)
    expected = [model[0].weight, model[2].weight, model[3].weight]
    assert [id(param) for param in decayed["params"]] == list(map(id, expected))
    expected = [model[0].bias, model[1].weight, model[1].bias, model[2].bias]
    assert [id(param) for param in undecayed["params"]] == list(map(id, expected))
    assert set(decayed) == set(undecayed) == {"params", "weight_decay"}


def test_empty_groups_are_left_out() -> None:
    assert [g["weight_decay"] for g in fusedopt.param_groups(nn.Linear(2, 2, False), 0.1)] == [0.1]
    assert [g["weight_decay"] for g in fusedopt.param_groups(nn.LayerNorm(2), 0.1)] == [0.0]
    assert fusedopt.param_groups(nn.ReLU(), 0.1) == []


def test_frozen_parameters_are_included() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    assert sum(len(group["params"]) for group in fusedopt.param_groups(model, 0.1)) == 2


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, fusedopt.FusedAdamW])
def test_an_optimizer_takes_the_groups(optimizer: type[torch.optim.Optimizer]) -> None:
    """With no gradient but zero, what moves is what decays, and by lr * weight_decay."""
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer(fusedopt.param_groups(model, 0.5), lr=0.1).step()
    for name, param in model.named_parameters():
        factor = 0.95 if name == "0.weight" else 1.0
        torch.testing.assert_close(param.detach(), factor * before[name])


@pytest.mark.parametrize("weight_decay", [-0.1, float("nan"), float("inf")])
def test_an_impossible_decay_is_named(weight_decay: float) -> None:
    with pytest.raises(ValueError, match=rf"got {weight_decay}.*`weight_decay=0\.0`"):
        fusedopt.param_groups(nn.Linear(2, 2), weight_decay)


@pytest.mark.parametrize("weight_decay", ["0.1", None, True])
def test_a_decay_that_is_no_number_is_named(weight_decay: object) -> None:
    with pytest.raises(TypeError, match=f"weight_decay must be a float, got {weight_decay!r}"):
        fusedopt.param_groups(nn.Linear(2, 2), weight_decay)  # type: ignore[arg-type]


def test_a_list_of_parameters_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        fusedopt.param_groups(list(nn.Linear(2, 2).parameters()), 0.1)  # type: ignore[arg-type]


def test_a_lazy_parameter_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"'1\.weight' of a lazy module.*run the model once"):
        fusedopt.param_groups(model, 0.1)
    model(torch.zeros(1, 2))
    assert names_without_decay(model) == {"0.bias", "1.bias"}


# Norms: torch's own by class, others by the words of their names

NORMS = [
    *("Norm", "RMSNorm", "RMSnorm", "RmsNorm2dFp32", "Layernorm", "layer_norm", "LAYERNORM"),
    *("LayerNormFp32", "BatchNormAct2d", "GroupNormAct", "GroupNorm1NoBias", "FrozenBatchNorm2d"),
    *("Qwen2RMSNorm", "Qwen2_5_VLRMSNorm", "NemotronLayerNorm1P", "NemotronH_Omni_RMSNorm"),
    *("MambaRMSNormGated", "ConvNextLayerNorm", "ConvLayerNorm", "Conv2dNorm", "KimiLinearRMSNorm"),
    *("xLSTMMultiHeadLayerNorm", "AutoformerLayernorm", "PPOCRV5ServerDetConvBatchnormLayer"),
    *("FilterResponseNormTlu2d", "EvoNorm2dS0a", "BatchRenorm", "MLPNorm", "EmbeddingNorm"),
    *("LayerNormalization", "InstanceNormalisation"),
]
NO_NORMS = [
    *("SurfaceNormalHead", "NormalizingFlow", "NormedLinear", "NormedEmbedding", "Normalize"),
    *("NormalOutput", "TextNormalizer", "Abnormal", "enormous", "LinearNormed"),
    *("LayerNormLinear", "LayerNormMLP", "GlobalResponseNormMlp", "WeightNormConv"),
    *("Wav2Vec2LayerNormConvLayer", "LayerNormLSTMCell", "LayernormGRU", "NormHead", "NormSoftmax"),
    *("RobertaPreLayerNormEmbeddings", "RobertaPreLayerNormSelfAttention", "NormMultiheadAttn"),
    *("ClNormMlpClassifierHead", "NormFreeNet", "PreNormTransformer", "NormExperts"),
]


def is_norm(module: nn.Module) -> bool:
    return "weight" in names_without_decay(module)


@pytest.mark.parametrize("name", NORMS + NO_NORMS)
def test_a_class_is_judged_by_the_words_of_its_name(name: str) -> None:
    assert is_norm(owner(name)) is (name in NORMS)


class HeadScale(nn.LayerNorm):
    """Says Head, and is a norm of torch."""


class LinearNorm(nn.Linear):
    """Says Norm, and is a linear layer of torch."""


class QKNormAttentionNorm(nn.MultiheadAttention):
    """Says Norm, and is torch's attention."""


def test_a_class_that_derives_from_torchs_is_what_that_one_is() -> None:
    assert names_without_decay(HeadScale((2, 3))) == {"weight", "bias"}
    assert names_without_decay(LinearNorm(2, 3)) == {"bias"}
    attention = QKNormAttentionNorm(2, 1)
    assert names_without_decay(attention) == {"in_proj_bias", "out_proj.bias"}
    for recurrent in (nn.LSTM, nn.GRUCell):
        module = type("Norm", (recurrent,), {})(2, 2)
        assert all("bias" in name for name in names_without_decay(module))


def test_the_nearest_class_whose_name_tells_decides() -> None:
    class Norm(nn.Module):
        pass

    class NormMLP(Norm):
        pass

    assert is_norm(owner("Gain", Norm))
    assert not is_norm(owner("Gain", NormMLP))
    assert is_norm(owner("Norm", NormMLP))


# ---- fp32_state_for ------------------------------------------------------------------------------


def test_modules_that_keep_fp32_state_have_groups_of_their_own():
    model = torch.nn.Sequential(torch.nn.Embedding(90, 64), torch.nn.Linear(64, 90))
    groups = fusedopt.param_groups(model, 0.1, fp32_state_for=torch.nn.Embedding)
    found = [(len(g["params"]), g["weight_decay"], "state_dtype" in g) for g in groups]
    assert found == [(1, 0.1, False), (1, 0.0, False), (1, 0.1, True)]
    assert groups[2]["params"][0] is model[0].weight and groups[2]["state_dtype"] is None
    opt = fusedopt.FusedAdamW(groups, state_dtype="8bit")
    opt.init_state()
    assert "exp_avg" in opt.state[model[0].weight]
    assert "exp_avg_log8" in opt.state[model[1].weight]
    both = (torch.nn.Embedding, torch.nn.Linear)
    wide = fusedopt.param_groups(model, 0.1, fp32_state_for=both)
    assert all(group["state_dtype"] is None for group in wide)


def test_what_is_no_class_of_modules_is_refused():
    with pytest.raises(TypeError, match="fp32_state_for must be a class of modules"):
        fusedopt.param_groups(torch.nn.Linear(2, 2), 0.1, fp32_state_for="embedding")
