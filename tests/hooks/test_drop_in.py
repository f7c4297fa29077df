"""Scripts written for the published classes run with another import line. Some numbers are the published tests' own."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from megascore.errors import HookStateError
from megascore.hooks import (
    ForwardHook,
    IndependentChannelContributionHook,
    IndependentKvHeadContributionHook,
    IterativeChannelContributionHook,
    L2NormHook,
    LayerNormContributionHook,
)
from megascore.hooks.schedule import num_pruned_after, pruning_schedule

pytestmark = pytest.mark.fast


def kv_settings(num_heads: int = 4, num_kv_heads: int = 2, **config: object) -> dict[str, object]:
    config = {"hidden_size": 6, "num_attention_heads": num_heads, **config}
    return {
        "model": SimpleNamespace(config=SimpleNamespace(**config)),
        "block_config": SimpleNamespace(attention=SimpleNamespace(num_key_value_heads=num_kv_heads)),
    }


@pytest.mark.parametrize("shape", [(32, 8), (8, 32)])
def test_iterative_scores_of_the_published_test(shape: tuple[int, int]) -> None:
    torch.manual_seed(42)
    linear = nn.Linear(in_features=6, out_features=4, bias=False)
    settings = {"validation_full_iters": 3, "clear_gpu_memory": False, "calibration_method": None}
    hook = IterativeChannelContributionHook(linear, settings)
    linear.register_forward_hook(hook)
    for _ in range(3):
        linear(torch.randn(*shape, 6))
    results = hook.to_dict()
    assert results["score"].tolist() == [5, 1, 3, 2, 4, 0]
    assert results["channels_importance_ascending"].tolist() == [5, 1, 3, 2, 4, 0]
    assert torch.equal(hook.accumulate(), results["score"])


def test_l2_norm_scores_of_the_published_test() -> None:
    torch.manual_seed(42)
    linear = nn.Linear(in_features=6, out_features=4, bias=False)
    hook = L2NormHook()
    linear.register_forward_hook(hook)
    for _ in range(3):
        linear(torch.randn(2, 3, 6))
    expected = torch.tensor([3.2030, 2.5018, 2.5272, 1.9222, 2.6204, 2.2623], dtype=torch.float32)
    torch.testing.assert_close(hook.accumulate(), expected, atol=1e-4, rtol=0)


def test_every_class_takes_the_second_argument_that_registrars_pass() -> None:
    linear, norm = nn.Linear(8, 6), nn.LayerNorm(6)
    settings = {"validation_full_iters": 2, **kv_settings(head_dim=2)}
    before = dict(settings)
    hooks: list[ForwardHook] = [
        L2NormHook(linear, settings),
        IndependentChannelContributionHook(linear, settings),
        IterativeChannelContributionHook(linear, settings),
        IndependentKvHeadContributionHook(linear, settings),
        LayerNormContributionHook(norm, settings),
    ]
    assert settings == before
    for hook in hooks[:-1]:
        linear.register_forward_hook(hook)
    norm.register_forward_hook(hooks[-1])
    for _ in range(2):
        norm(linear(torch.randn(5, 3, 8)))
    assert [len(hook.to_dict()["score"]) for hook in hooks] == [8, 8, 8, 2, 6]


def test_output_may_be_a_tuple_with_the_bias_beside() -> None:
    linear = nn.Linear(8, 6, bias=False)
    x = torch.randn(5, 3, 8)
    scores = []
    for output in (linear(x), (linear(x), None)):
        hook = IterativeChannelContributionHook(
            linear, {"validation_full_iters": 1, "calibration_method": "scale_by_magnitude"}
        )
        hook(linear, (x,), output)
        scores.append(hook.accumulate())
    assert torch.equal(*scores)


def test_layer_with_input_size_is_a_linear_layer() -> None:
    class RowParallelLike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input_size = 8
            self.weight = nn.Parameter(torch.randn(6, 8))

    layer = RowParallelLike()
    x = torch.randn(5, 3, 8)
    for hook in (
        IndependentChannelContributionHook(layer),
        IterativeChannelContributionHook(layer, {"validation_full_iters": 1}),
        IndependentKvHeadContributionHook.for_heads(layer, 2),
    ):
        hook(layer, (x,), (x @ layer.weight.T, None))  # type: ignore[arg-type]
        assert hook.accumulate().isfinite().all()


@pytest.mark.parametrize("optimize_for", ["latency", "memory"])
@pytest.mark.parametrize("config", [{"head_dim": 3}, {"head_dim": None, "hidden_size": 12}, {"hidden_size": 12}])
def test_kv_head_reads_hugging_face_configs(optimize_for: str, config: dict[str, object]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 5)
    x = torch.randn(4, 3, 12)
    hook = IndependentKvHeadContributionHook(linear, kv_settings(**config) | {"optimize_for": optimize_for})
    direct = IndependentKvHeadContributionHook.for_heads(linear, 2)
    for each in (hook, direct):
        each(linear, (x,), linear(x))
    assert torch.equal(hook.accumulate(), direct.accumulate())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "must hold 'model' with .config"),
        (kv_settings(head_dim=3) | {"optimize_for": "speed"}, "must be one of latency, memory; got 'speed'"),
        (kv_settings(head_dim=4), "4 query heads of 4 and 2 KV heads, but the projection has 12 inputs"),
        (kv_settings(num_kv_heads=3, head_dim=3), "4 query heads of 3 and 3 KV heads"),
    ],
)
def test_kv_head_says_what_is_wrong_with_its_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(HookStateError, match=message):
        IndependentKvHeadContributionHook(nn.Linear(12, 5), settings)


def test_progress_of_the_iterative_hook_has_the_published_keys() -> None:
    linear = nn.Linear(10, 4)
    hook = IterativeChannelContributionHook(linear, {"validation_full_iters": 4})
    x = torch.randn(2, 3, 10)
    hook(linear, (x,), linear(x))
    assert hook.get_progress_info() == {
        "curr_iter": 1,
        "total_iters": 4,
        "progress": 0.25,
        "pruned_channels_count": 3,
        "total_channels": 10,
    }
    assert L2NormHook().get_progress_info() == {}


@pytest.mark.parametrize(
    ("num_channels", "num_iterations", "expected"),
    [(10, 4, [3, 3, 2, 2]), (4, 10, [0, 1, 0, 0, 1, 0, 1, 0, 0, 1]), (6, 3, [2, 2, 2]), (1, 3, [0, 0, 1])],
)
def test_schedule_prunes_every_channel_and_one_in_the_last_iteration(
    num_channels: int, num_iterations: int, expected: list[int]
) -> None:
    assert pruning_schedule(num_channels, num_iterations) == expected
    assert sum(expected) == num_channels


def test_the_number_pruned_so_far_is_that_of_the_schedule() -> None:
    for num_channels in range(1, 13):
        for num_iterations in range(1, 30):
            schedule = pruning_schedule(num_channels, num_iterations)
            for done in range(num_iterations + 1):
                assert num_pruned_after(done, num_channels, num_iterations) == sum(schedule[:done])


def results_in(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    loaded: dict[str, dict[str, torch.Tensor]] = torch.load(folder / "rank_0.pth", weights_only=True)
    return loaded


def test_files_have_the_published_names_and_hold_the_results(tmp_path: Path) -> None:
    linear = nn.Linear(8, 6)
    hooks = {"a.b": L2NormHook(), "a.c": IndependentChannelContributionHook(linear)}
    x = torch.randn(5, 3, 8)
    for hook in hooks.values():
        hook(linear, (x,), linear(x))
    folder = tmp_path / "new" / "log"
    ForwardHook.save_hook_states(hooks, str(folder))
    args = OmegaConf.create({"steps": 3, "path": "${oc.env:HOME,x}", "activation_hooks_kwargs": {"iters": 2}})
    ForwardHook.dump_activations_logs(hooks, folder, args)
    assert {path.name for path in folder.iterdir()} == {"hook_states_rank_0.pth", "rank_0.pth", "args.json"}
    for name, hook in hooks.items():
        assert all(torch.equal(results_in(folder)[name][key], value) for key, value in hook.to_dict().items())
    states = torch.load(folder / "hook_states_rank_0.pth", weights_only=True)
    fresh = L2NormHook()
    fresh.load_state_dict(states["a.b"])
    assert torch.equal(fresh.accumulate(), hooks["a.b"].accumulate())
    written = json.loads((folder / "args.json").read_text())
    assert written["steps"] == 3
    assert written["activation_hooks_kwargs"] == {"iters": 2}


@pytest.mark.parametrize("kind", ["dict", "namespace", "omegaconf"])
def test_live_models_stay_out_of_the_arguments_file_and_in_the_arguments(tmp_path: Path, kind: str) -> None:
    model = nn.Linear(2, 2)
    content = {"eval_samples": 4, "activation_hooks_kwargs": {"model": model, "iters": 2, "other": object}}
    args: object = content
    if kind == "namespace":
        args = SimpleNamespace(**content)
    elif kind == "omegaconf":
        args = OmegaConf.create(content, flags={"allow_objects": True})
    hook = L2NormHook()
    hook(model, (torch.ones(2, 1, 2),), torch.ones(2, 1, 2))
    ForwardHook.dump_activations_logs({"m": hook}, tmp_path, args)
    written = json.loads((tmp_path / "args.json").read_text())
    assert written["eval_samples"] == 4
    assert set(written["activation_hooks_kwargs"]) == {"iters", "other"}
    kwargs = args.activation_hooks_kwargs if kind != "dict" else content["activation_hooks_kwargs"]  # type: ignore[attr-defined]
    assert kwargs["model"] is model


def test_layer_norm_dump_ranks_features_over_all_norms(tmp_path: Path) -> None:
    norms = [nn.LayerNorm(4), nn.LayerNorm(4)]
    hooks = {f"n{i}": LayerNormContributionHook(norm, {}) for i, norm in enumerate(norms)}
    (tmp_path / "rank_7.pth").write_bytes(b"of an older, wider run")
    for i, hook in enumerate(hooks.values()):
        output = torch.tensor([[4.0, 1.0, 2.0, 3.0]]) * (i + 1)
        hook(norms[i], (output,), output)
    args = SimpleNamespace(model_name_or_path="m", dataset_path="d", eval_samples=8, micro_batch_size=2)
    LayerNormContributionHook.dump_activations_logs(hooks, tmp_path, args)
    report = json.loads((tmp_path / "channel_importance_results.json").read_text())
    assert report["channel_importance_ranking"] == [0, 3, 2, 1]
    assert report["channel_scores"] == [6.0, 1.5, 3.0, 4.5]
    assert report["score_statistics"] == pytest.approx({"min": 1.5, "max": 6, "mean": 3.75, "std": 1.9364916})
    found = {key: report[key] for key in ("model_path", "dataset_path", "eval_samples", "micro_batch_size")}
    assert found == {"model_path": "m", "dataset_path": "d", "eval_samples": 8, "micro_batch_size": 2}
    assert report["total_channels"] == 4
    assert report["experiment_id"] == f"experiment_{report['timestamp']}"


def test_file_that_cannot_be_written_leaves_the_old_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = L2NormHook()
    hook(nn.Identity(), (torch.ones(2, 1, 2),), torch.ones(2, 1, 2))
    ForwardHook.save_hook_states({"m": hook}, tmp_path)
    before = (tmp_path / "hook_states_rank_0.pth").read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    hook(nn.Identity(), (torch.ones(2, 1, 2),), torch.ones(2, 1, 2))
    with pytest.raises(OSError, match="disk full"):
        ForwardHook.save_hook_states({"m": hook}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["hook_states_rank_0.pth"]
    assert (tmp_path / "hook_states_rank_0.pth").read_bytes() == before
