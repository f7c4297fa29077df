"""`attach` on a plain Hugging Face model, in a loop of one's own, without megatron."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import megascore
from megascore.errors import ConfigError, HookStateError, ModelError
from tests.mcore.oracle import all_scores
from tests.models import SIZES, load_with_transformers, save_checkpoint
from tests.pool import WorkerPool

HEAD_DIM = SIZES["hidden_size"] // SIZES["num_attention_heads"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("plain") / "llama", "llama")


@pytest.fixture
def model(folder: Path) -> nn.Module:
    return load(folder)


def load(folder: Path) -> nn.Module:
    return load_with_transformers(folder, torch.float64)


def make_tokens(num_samples: int = 6) -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (num_samples, 16), generator=torch.Generator().manual_seed(0))


def score(model: nn.Module, tokens: Tensor, batch_size: int) -> megascore.Scores:
    with megascore.attach(model, recipe="minitron") as run:
        for batch in tokens.split(batch_size):
            model(batch)
            run.step()
    return run.finish()


def test_scores_equal_formulas_on_raw_activations(model: nn.Module) -> None:
    tokens = make_tokens()
    kept: dict[str, Tensor] = {}
    decoder = model.model
    wanted = {"ffn": decoder.layers[2].mlp.down_proj, "heads": decoder.layers[2].self_attn.o_proj, "norm": decoder.norm}
    for name, module in wanted.items():
        keep_output = name == "norm"
        module.register_forward_hook(
            lambda _, args, output, name=name, keep=keep_output: kept.update({name: output if keep else args[0]})
        )
    # Blocks return a tuple before transformers 5.
    decoder.layers[2].register_forward_hook(
        lambda _, args, output: kept.update(before=args[0], after=output[0] if isinstance(output, tuple) else output)
    )
    scores = score(model, tokens, len(tokens))

    def l2_norm(x_BSC: Tensor) -> Tensor:
        return (x_BSC.abs().mean(1) ** 2).sum(0).sqrt()

    layer = "decoder.layers.2"
    torch.testing.assert_close(scores[f"{layer}.mlp.linear_fc2/ffn"], l2_norm(kept["ffn"]))
    heads = l2_norm(kept["heads"]).view(-1, HEAD_DIM).norm(dim=1)
    torch.testing.assert_close(scores[f"{layer}.self_attention.linear_proj/attention_heads"], heads)
    torch.testing.assert_close(scores["decoder.final_layernorm/hidden_size"], l2_norm(kept["norm"]))
    cosine = torch.nn.functional.cosine_similarity(kept["before"], kept["after"], dim=-1).mean()
    torch.testing.assert_close(scores["decoder/layers"][2], 1 - cosine)
    norms = [scores[key] for key in scores if "/hidden_size/" in key and not key.startswith("decoder/")]
    assert len(norms) == 2 * SIZES["num_hidden_layers"] + 1
    torch.testing.assert_close(scores["decoder/hidden_size"], torch.stack(norms).sum(0))


def test_batches_do_not_matter(model: nn.Module) -> None:
    whole, pieces = score(model, make_tokens(), 6), score(model, make_tokens(), 4)
    assert list(whole) == list(pieces)
    for key in whole:
        # float64: only the order of additions differs.
        torch.testing.assert_close(whole[key], pieces[key], rtol=1e-12, atol=0)


def test_metadata_tells_what_was_seen(model: nn.Module) -> None:
    metadata = score(model, make_tokens(), 2).metadata
    assert (metadata["num_tokens"], metadata["num_samples"], metadata["num_steps"]) == (96, 6, 3)
    assert metadata["layout"] == {"data": 1}
    assert metadata["model"]["num_kv_heads"] == SIZES["num_key_value_heads"]
    assert metadata["scores"] == [
        "attention_heads/l2_norm",
        "ffn/l2_norm",
        "hidden_size/l2_norm",
        "layers/block_similarity",
    ]


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "FSDP"])
def test_data_parallel_ranks_add_up(sharded: bool, world: WorkerPool, folder: Path) -> None:
    expected = world.run(1, score_part, str(folder), False)[0]
    for scores in world.run(2, score_part, str(folder), sharded):
        assert scores.keys() == expected.keys()
        for key, value in scores.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-12, atol=0)


def score_part(folder: str, sharded: bool) -> dict[str, Tensor]:
    """Every method, on this rank's part of the samples."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = load(Path(folder))
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh)
    # 6 samples over 2 ranks, unevenly.
    own = make_tokens() if dist.get_world_size() == 1 else make_tokens().split([4, 2])[dist.get_rank()]
    with megascore.attach(model, scores=all_scores(1)) as run, torch.no_grad():
        model(own)
        run.step()
    return dict(run.finish())


def test_the_model_is_as_before_also_after_an_error(model: nn.Module) -> None:
    model.train()
    model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    run = megascore.attach(model, recipe="minitron")
    with pytest.raises(RuntimeError, match="my own"), run:
        assert not any(module.training for module in model.modules())
        raise RuntimeError("my own")
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(HookStateError, match="no activations collected"):
        run.finish()


def test_hooks_of_others_stay(model: nn.Module) -> None:
    calls = []
    handle = model.model.norm.register_forward_hook(lambda *_: calls.append(1))
    score(model, make_tokens(2), 2)
    assert calls == [1]
    assert len(model.model.norm._forward_hooks) == 1
    handle.remove()


def test_a_run_can_go_on_after_finish(model: nn.Module) -> None:
    tokens = make_tokens()
    with megascore.attach(model, recipe="minitron") as run:
        model(tokens[:4])
        run.step()
        first = run.finish()
        model(tokens[4:])
        run.step()
        second = run.finish()
    assert first.metadata["num_samples"] == 4
    key = "decoder/hidden_size/l2_norm"
    torch.testing.assert_close(second[key], score(model, tokens, 6)[key], rtol=1e-12, atol=0)


def test_single_scores_can_be_asked_for(model: nn.Module) -> None:
    with megascore.attach(model, scores=[{"target": "ffn"}]) as run:
        model(make_tokens(2))
    assert {key.split("/")[1] for key in run.finish()} == {"ffn"}


def test_a_model_without_known_modules_is_refused() -> None:
    with pytest.raises(ModelError, match="Sequential has no 'layers' with 'self_attn' inside"):
        megascore.attach(nn.Sequential(nn.Linear(2, 2)))


def test_recipe_and_scores_together_are_refused(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="recipe='minitron' and scores"):
        megascore.attach(model, recipe="minitron", scores=[{"target": "ffn"}])


def test_a_target_that_matches_nothing_is_refused(model: nn.Module) -> None:
    for layer in model.model.layers:
        layer.mlp = nn.Identity()
    with pytest.raises(ModelError, match="target 'ffn' matches no module on any rank"):
        megascore.attach(model, scores=[{"target": "ffn"}])
    assert not any(module._forward_hooks for module in model.modules())
