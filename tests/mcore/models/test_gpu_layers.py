"""Layers as they are built on a GPU, and those that are refused because no hook would see them; without a GPU."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import nn

from megascore.config import ParallelConfig
from megascore.errors import ModelError
from megascore.mcore.sites.fused_norm import fused_norm_output
from tests.mcore.expert_model import Variant, build_expert_model
from tests.pool import WorkerPool


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_a_weight_centred_at_zero_keeps_its_digits_beside_the_one(normalization: str) -> None:
    """In bfloat16 1 + w has 8 bits: too few for a score, which must tell channels apart."""
    torch.manual_seed(0)
    module = nn.Module()
    module.layer_norm_weight = nn.Parameter((torch.randn(64) * 0.01).bfloat16())
    is_rms = normalization == "RMSNorm"
    module.layer_norm_bias = None if is_rms else nn.Parameter(torch.randn(64).bfloat16())
    module.normalization, module.eps, module.zero_centered_gamma = normalization, 1e-5, True
    x = torch.randn(4096, 1, 64).bfloat16()
    weight = module.layer_norm_weight.detach().double() + 1
    if is_rms:
        expected = nn.functional.rms_norm(x.double(), (64,), weight, 1e-5)
    else:
        expected = nn.functional.layer_norm(x.double(), (64,), weight, module.layer_norm_bias.detach().double(), 1e-5)
    found = fused_norm_output(module, x).double().abs().mean((0, 1))
    # Roundings of the activations, 2^-9 each, cancel over 4096 tokens; that of the weight would be up to 2^-9.
    torch.testing.assert_close(found, expected.abs().mean((0, 1)), rtol=2e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_transformer_engine_is_used_where_it_has_kernels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from megascore.mcore.models import spec

    monkeypatch.setattr(spec, "has_transformer_engine", lambda: True)
    assert spec.uses_grouped_experts(torch.device("cuda"), dtype) == (dtype != torch.float64)
    assert not spec.uses_grouped_experts(torch.device("cpu"), dtype)


@pytest.mark.parametrize("what", ["graphs", "padded"])
def test_layers_in_which_no_hook_is_called_are_refused(what: str, world: WorkerPool) -> None:
    message = {
        "graphs": "captured CUDA graphs",
        "padded": "with moe_use_grouped_tensor set, experts are given padding",
    }[what]
    with pytest.raises(Exception, match=message):
        world.run(1, attach_to_refused, what)


def attach_to_refused(what: str) -> None:
    from megatron.core.transformer import cuda_graphs

    import megascore
    from megascore.mcore.world.parallel_world import parallel_world

    with parallel_world(ParallelConfig(), torch.device("cpu"), timedelta(seconds=60)):
        chunks: list[Any] = build_expert_model(ParallelConfig(), Variant("alltoall"))
        config = chunks[0].config
        record = cuda_graphs._CudagraphGlobalRecord
        if what == "graphs":
            config.cuda_graph_impl, record.cudagraph_created = "local", True
        else:
            config.moe_use_grouped_tensor = True
        try:
            megascore.attach(chunks, scores=[{"target": "experts"}])
        except ModelError as error:
            raise RuntimeError(str(error)) from None
        finally:
            record.cudagraph_created = False
