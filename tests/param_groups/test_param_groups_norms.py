"""Which classes are norms: torch's own by class, others by the words of their names."""

from __future__ import annotations

import pytest
import torch
from param_group_helpers import names_without_decay
from torch import nn

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


def owner(name: str, *bases: type[nn.Module]) -> nn.Module:
    """A module of a class of this name, with a weight of two dimensions."""
    module = type(name, bases or (nn.Module,), {})()
    module.weight = nn.Parameter(torch.ones(2, 2))
    return module


def is_norm(module: nn.Module) -> bool:
    return "weight" in names_without_decay(module)


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_by_the_words_of_its_name(name: str) -> None:
    assert is_norm(owner(name))


@pytest.mark.parametrize("name", NO_NORMS)
def test_no_norm_by_the_words_of_its_name(name: str) -> None:
    assert not is_norm(owner(name))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("convert", ["script", "trace"])
@pytest.mark.parametrize("name", ["RMSNorm", "Layernorm", "NormalizingFlow", "LayerNormMLP"])
def test_a_scripted_class_is_judged_by_the_same_words(convert: str, name: str) -> None:
    module = nn.Sequential(owner(name, nn.Identity))
    inputs = [torch.zeros(2)] if convert == "trace" else []
    scripted = getattr(torch.jit, convert)(module, *inputs)
    assert names_without_decay(scripted) == names_without_decay(module)
    assert bool(names_without_decay(module)) is (name in NORMS)


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


@pytest.mark.parametrize("name", ["bias1", "biasTable", "inProjBias", "BIAS"])
def test_the_words_of_a_parameters_name_are_found_alike(name: str) -> None:
    model = nn.Module()
    model.register_parameter(name, nn.Parameter(torch.ones(2, 2)))
    assert names_without_decay(model) == {name}
