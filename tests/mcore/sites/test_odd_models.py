"""Megatron models of other makes: every module is scored, or it is told by name that it is not."""

from __future__ import annotations

import re
import warnings
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor

import megascore
from megascore.config import ParallelConfig
from megascore.errors import ModelError
from megascore.sites.targets import PlaceKind
from tests.mcore.oracle import Recorder, expected_scores
from tests.mcore.sites import odd_models
from tests.pool import WorkerPool

CPU = torch.device("cpu")
HIDDEN, SEQUENCE = 32, 16


ALONE = ParallelConfig()


def parallel_world(parallel: ParallelConfig = ALONE) -> Any:
    from megascore.mcore.world import parallel_world as world

    return world.parallel_world(parallel, CPU, timedelta(seconds=60))


def run_model(model: Any) -> None:
    tokens = torch.randint(0, odd_models.VOCAB, (3, SEQUENCE), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        model(tokens, torch.arange(SEQUENCE).expand(3, -1), None)


def attach(model: Any, scores: Any = None) -> tuple[Any, str]:
    """Return the run, and what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = megascore.attach(model, scores=scores or "minitron")
    return run, " ".join(str(warning.message) for warning in caught if "scores nothing" in str(warning.message))


@pytest.mark.parametrize("tensor", [1, 2])
def test_heads_of_multi_latent_attention_are_as_wide_as_their_values(tensor: int, world: WorkerPool) -> None:
    expected, _, _ = world.run(1, score_latent_attention, 1)[0]
    for _, scores, (told, refused) in world.run(tensor, score_latent_attention, tensor):
        assert len(scores["decoder.layers.1.self_attention.linear_proj/attention_heads/l2_norm"]) == 4
        assert scores.keys() == expected.keys()
        for key, value in scores.items():
            # float64: only the order of additions differs.
            torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=0, msg=key)
        assert told == ""
        assert "target 'kv_heads' matches no module" in refused


def score_latent_attention(tensor: int) -> tuple[dict[str, Tensor], dict[str, Tensor], tuple[str, str]]:
    """Expected scores (of one rank), scores, and what attach says."""
    parallel = ParallelConfig(tensor=tensor)
    with parallel_world(parallel):
        torch.manual_seed(7)
        model = odd_models.latent_attention(tensor)
        recorder = Recorder(model)
        run, told = attach(model)
        with run:
            run_model(model)
            run.step()
        with pytest.raises(ModelError) as caught:
            megascore.attach(model, scores=[{"target": "kv_heads"}])
        expected = expected_scores(recorder, 2, head_dim=6) if tensor == 1 else {}
        facts = run.view.facts
        assert (facts["num_kv_heads"], facts["head_dim"]) == (4, 6)
        return expected, dict(run.finish()), (told, str(caught.value))


def test_layers_that_differ_are_scored_as_they_are(world: WorkerPool) -> None:
    widths, told, scored = world.run(1, look_at_mixed_layers)[0]
    linear_proj, linear_fc2 = "decoder.layers.{}.self_attention.linear_proj", "decoder.layers.{}.mlp.linear_fc2"
    assert widths == {
        (linear_proj.format(0), "attention output projection, by KV head"): 2,
        (linear_proj.format(1), "attention output projection, by KV head"): 1,
        (linear_fc2.format(0), "FFN output projection"): 48,
        (linear_fc2.format(1), "FFN output projection"): 24,
    }
    assert "decoder.layers.2.mlp: ColumnParallelLinearGathered, a linear layer in place of attention" in told
    assert "decoder.layers.3.self_attention: ColumnParallelLinearGathered" in told
    assert told.count("decoder.layers") == 2
    norms = {key.rsplit("/", 2)[0] for key in scored if "/hidden_size" in key}
    assert {"decoder.layers.2.pre_mlp_layernorm", "decoder.layers.3.input_layernorm"} <= norms
    assert not {"decoder.layers.2.input_layernorm", "decoder.layers.3.pre_mlp_layernorm"} & norms


def look_at_mixed_layers() -> tuple[dict[tuple[str, str], int], str, list[str]]:
    with parallel_world():
        model = odd_models.mixed_layers()
        run, told = attach(model)
        with run:
            run_model(model)
            run.step()
        widths = {
            (place.name, place.kind.value): place.placement.shard.total
            for place in run.view.places
            if place.kind.value.startswith(("FFN", "attention output projection, by"))
        }
        return widths, told, list(run.finish())


def test_scores_of_layers_that_differ_equal_the_oracle_on_each_number_of_ranks(world: WorkerPool) -> None:
    expected = world.run(1, score_mixed_layers, 1)[0][0]
    sizes = {key: len(value) for key, value in expected.items() if "/hidden_size" not in key}
    linear_proj, linear_fc2 = "decoder.layers.{}.self_attention.linear_proj", "decoder.layers.{}.mlp.linear_fc2"
    assert sizes == {
        f"{linear_proj.format(0)}/attention_heads/l2_norm": 4,
        f"{linear_proj.format(1)}/attention_heads/l2_norm": 4,
        f"{linear_proj.format(0)}/kv_heads/independent_contribution": 2,
        f"{linear_proj.format(1)}/kv_heads/independent_contribution": 1,
        f"{linear_fc2.format(0)}/ffn/l2_norm": 48,
        f"{linear_fc2.format(1)}/ffn/l2_norm": 24,
    }
    for tensor in (1, 2):
        for _, scores, groups in world.run(tensor, score_mixed_layers, tensor):
            assert scores.keys() == expected.keys()
            for key, value in scores.items():
                # float64: only the order of additions differs.
                torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=0, msg=key)
            assert groups == [(4, 2), (4, 1)]


def score_mixed_layers(tensor: int) -> tuple[dict[str, Tensor], dict[str, Tensor], list[tuple[int | None, int | None]]]:
    """Expected scores (of one rank), scores, and the heads and KV heads of each layer that has some."""
    wanted = [{"target": target} for target in ("ffn", "kv_heads", "hidden_size")]
    wanted.append({"target": "attention_heads", "method": "l2_norm"})
    with parallel_world(ParallelConfig(tensor=tensor)):
        torch.manual_seed(7)
        model = odd_models.mixed_layers(tensor)
        recorder = Recorder(model)
        run, _ = attach(model, wanted)
        with run:
            run_model(model)
            run.step()
        groups = [
            (place.num_heads, place.num_competing_groups)
            for place in run.view.places
            if place.kind is PlaceKind.ATTENTION_PROJECTION
        ]
        expected = expected_of_mixed_layers(model, recorder) if tensor == 1 else {}
        return expected, dict(run.finish()), groups


def expected_of_mixed_layers(model: Any, recorder: Recorder) -> dict[str, Tensor]:
    """Float64 formulas on each module's own tensors; of 4 heads 2, then 4, share one KV head."""
    scores, norms = {}, []
    for name in list(recorder.inputs):
        if name.endswith("layernorm"):
            if "Identity" not in type(model.get_submodule(name)).__name__:
                norms.append(mean_norm(recorder.outputs[name][0]))
                scores[f"{name}/hidden_size/l2_norm"] = norms[-1]
        elif name.endswith("linear_fc2"):
            scores[f"{name}/ffn/l2_norm"] = mean_norm(recorder.inputs[name][0])
        elif name.endswith("linear_proj"):
            inputs, weight = recorder.inputs[name][0], recorder.weights[name]
            heads = mean_norm(inputs).view(4, -1)
            scores[f"{name}/attention_heads/l2_norm"] = heads.norm(dim=1)
            width = inputs.shape[-1] // {"0": 2, "1": 1}[name.split(".")[2]]
            parts = zip(inputs.flatten(0, 1).split(width, 1), weight.split(width, 1), strict=True)
            scores[f"{name}/kv_heads/independent_contribution"] = torch.stack(
                [(x @ w.T).norm(dim=1).mean() for x, w in parts]
            )
    scores["decoder/hidden_size/l2_norm"] = torch.stack(norms).sum(0)
    return scores


def mean_norm(values: Tensor) -> Tensor:
    """Mean magnitude over the sequence, then the norm over the samples, of [S, B, C]."""
    return values.abs().mean(0).norm(dim=0)


@pytest.mark.parametrize(
    "says_so",
    [True, False],
    ids=["the projection's config says so", "only the attention says so"],
)
def test_kv_heads_of_layers_that_differ_are_scored_as_they_are(says_so: bool, world: WorkerPool) -> None:
    assert world.run(1, score_kv_heads_of_mixed_layers, says_so)[0] == [2, 1]


def score_kv_heads_of_mixed_layers(says_so: bool) -> list[int]:
    with parallel_world():
        model = odd_models.mixed_layers()
        if not says_so:
            for layer in model.decoder.layers[:2]:
                layer.self_attention.linear_proj.config = model.config
        run, _ = attach(model, [{"target": "kv_heads"}])
        with run:
            run_model(model)
            run.step()
        return [len(score) for score in run.finish().values()]


def test_what_is_beside_the_decoder_is_named_by_rank_0(world: WorkerPool) -> None:
    (prediction, towers, mamba), others = world.run(2, attach_to_odd_models)
    assert others == ("", "", mamba)
    assert (
        prediction
        == "megascore does not know these modules, and scores nothing in them: mtp: MultiTokenPredictionBlock, "
        "which stands behind the decoder and is not part of it."
    )
    assert towers == "megascore does not know these modules, and scores nothing in them: vision_model: Module."
    assert re.search(r"the model has no .*It has, of kinds that are not known: decoder: MambaStack\.", mamba)


def attach_to_odd_models() -> tuple[str, str, str]:
    with parallel_world():
        told = []
        for model in (odd_models.with_token_prediction(), odd_models.two_towers()):
            run, text = attach(model)
            run.close()
            assert {place.local_name.rpartition("decoder.layers.")[0] for place in run.view.places} <= {
                "",
                "language_model.",
            }
            told.append(text)
        with pytest.raises(ModelError) as caught:
            megascore.attach(odd_models.mamba())
        return told[0], told[1], str(caught.value)


def test_two_stacks_of_layers_of_which_none_is_the_language_model_are_refused(world: WorkerPool) -> None:
    text, num_sites = world.run(1, attach_to_two_stacks)[0]
    assert "several stacks of layers ('vision_model.decoder', 'language_model')" in text
    assert "attach(model, part='language_model')" in text
    # Two layers with attention, MLP and two norms, and the norm behind them.
    assert num_sites == 11


def attach_to_two_stacks() -> tuple[str, int]:
    with parallel_world():
        model = odd_models.two_towers()
        model.language_model = model.language_model.decoder
        with pytest.raises(ModelError) as caught:
            megascore.attach(model, recipe="minitron")
        run = megascore.attach(model, recipe="minitron", part="language_model")
        run.close()
        return str(caught.value), len(run.sites)
