"""Every method at every target, on every kind of model: its oracle's value, or a refusal by name; never another score.

The lists come from the registry, so a method that is added without an oracle fails here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import megascore
from megascore.config import ParallelConfig
from megascore.errors import ConfigError, ModelError
from megascore.hooks.registry import methods
from megascore.sites.requests import resolve_scores
from megascore.sites.targets import TARGETS
from tests.blockwise import tiny_decoder
from tests.blockwise.tiny_decoder import TinyDecoder
from tests.mcore.oracle import (
    Recorder,
    expected_contributions,
    expected_moments,
    expected_scores,
    iterative_ranks,
    projection_moments,
)
from tests.pool import WorkerPool

Pair = tuple[str, str]
Found = tuple[dict[Pair, dict[str, Tensor]], dict[Pair, str], dict[str, Tensor]]
"""Scores and refusals by (target, method), and what the oracles expect, by the keys of the score file."""

OPTIONS = {"iterative_contribution": {"iterations": 2, "calibration_method": "scale_by_magnitude"}}
STEPS = [[0, 1], [2, 3]]
"""Samples of each step."""
OF_PACKAGE = [
    pair
    for pair, method in methods().items()
    # A random score is what its generator says, in tests/hooks/test_random_order.py.
    if method.hook.__module__.startswith("megascore.") and pair[1] != "random" and not method.hook.needs_job
]
NEEDING_JOB = [pair for pair, method in methods().items() if method.hook.needs_job]
ROUTED = {"experts", "expert_ffn", "shared_expert_ffn"}
TOLERANCE = 1e-9
"""float64: only the order of additions differs."""


def score_each(model: nn.Module | Sequence[nn.Module], run_samples: Callable[[list[int]], None], oracle: Any) -> Found:
    """Ask for each pair alone; ``oracle`` makes what is expected from a context in which samples run one by one."""
    found, refused = {}, {}
    for target, method in OF_PACKAGE:
        try:
            with megascore.attach(
                model, scores=[{"target": target, "method": method, **OPTIONS.get(method, {})}]
            ) as run:
                for step in STEPS:
                    run_samples(step)
                    run.step()
            found[target, method] = dict(run.finish())
        except ModelError as error:
            refused[target, method] = str(error)
    return found, refused, oracle(lambda: [run_samples([sample]) for step in STEPS for sample in step])


class PlainRecorder(Recorder):
    """What a plain model of the Llama family runs, under Megatron's names, sequence first."""

    def __init__(self, model: TinyDecoder) -> None:
        super().__init__(nn.Module())
        modules: dict[str, nn.Module] = {"decoder.final_layernorm": model.norm}
        for number, layer in enumerate(model.layers):
            own: Any = layer
            name = f"decoder.layers.{number}"
            modules |= {
                name: own,
                f"{name}.mlp.linear_fc2": own.mlp.down_proj,
                f"{name}.self_attention.linear_proj": own.self_attn.o_proj,
                f"{name}.input_layernorm": own.input_layernorm,
                f"{name}.pre_mlp_layernorm": own.post_attention_layernorm,
            }
        for name, module in modules.items():
            if isinstance(module, nn.Linear):
                self.weights[name] = module.weight.detach()
            module.register_forward_hook(self._batch_first(name), with_kwargs=True)

    def _batch_first(self, name: str) -> Any:
        keep = self._keep(name)

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            # A bias is no part of what pruning takes away.
            bias = module.bias if isinstance(module, nn.Linear) else torch.zeros(())
            keep(module, (args[0].transpose(0, 1),), kwargs, (output - bias).transpose(0, 1))

        return hook


def on_plain() -> Found:
    model = TinyDecoder()
    tokens = torch.randint(0, tiny_decoder.VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def run_samples(samples: list[int]) -> None:
        model(tokens[samples])

    def oracle(run_each: Callable[[], Any]) -> dict[str, Tensor]:
        recorder = PlainRecorder(model)
        run_each()
        num_layers, head_dim = len(model.layers), tiny_decoder.HIDDEN // tiny_decoder.HEADS
        return {
            **expected_scores(recorder, num_layers, head_dim),
            # Its values are as many as its queries, whatever its config says.
            **expected_contributions(recorder, num_layers, tiny_decoder.HEADS, STEPS, tiny_decoder.HEADS),
            **expected_moments(recorder, num_layers, head_dim),
        }

    return score_each(model, run_samples, oracle)


def on_megatron() -> Found:
    """A dense layer and layers with routed and shared experts."""
    from megascore.mcore.pipeline.schedule import forward_only
    from tests.mcore import expert_model, expert_oracle

    sizes = expert_model.SIZES
    tokens = torch.randint(0, sizes["vocab"], (4, sizes["sequence"]), generator=torch.Generator().manual_seed(0))
    with _alone():
        chunks = expert_model.build_expert_model(ParallelConfig())

        def run_samples(samples: list[int]) -> None:
            forward_only(chunks, [tokens[sample][None] for sample in samples], compute_loss=False)

        def oracle(run_each: Callable[[], Any]) -> dict[str, Tensor]:
            recorder, experts = Recorder(chunks[0]), expert_oracle.record(chunks[0])
            run_each()
            num_layers, head_dim = len(chunks[0].decoder.layers), sizes["hidden"] // sizes["heads"]
            shared = [name for name in recorder.inputs if "shared_experts" in name]
            return {
                **expected_scores(recorder, num_layers, head_dim),
                **expected_contributions(recorder, num_layers, 2, STEPS, sizes["heads"]),
                **expected_moments(recorder, num_layers, head_dim),
                **experts.scores(),
                **{
                    f"{name}/shared_expert_ffn/iterative_contribution": iterative_ranks(recorder, name, STEPS)
                    for name in shared
                },
                **{
                    f"{name}/shared_expert_ffn/{method}": score
                    for name in shared
                    for method, score in projection_moments(recorder.inputs[name], recorder.weights[name]).items()
                },
            }

        return score_each(chunks, run_samples, oracle)


@contextmanager
def _alone() -> Iterator[None]:
    from megascore.mcore.world.parallel_world import parallel_world

    with parallel_world(ParallelConfig(), torch.device("cpu"), timedelta(seconds=60)):
        yield


@pytest.mark.parametrize(("kind", "missing"), [(on_plain, ROUTED), (on_megatron, set())], ids=["plain", "Megatron"])
def test_every_pair_is_its_oracles_or_refused(kind: Callable[[], Found], missing: set[str], world: WorkerPool) -> None:
    found, refused, expected = world.run(1, kind)[0]
    assert {target for target, _ in refused} == missing
    for (target, _), message in refused.items():
        assert f"target '{target}' matches no module on any rank" in message
        assert TARGETS[target].kind.value in message
    assert set(found) | set(refused) == set(OF_PACKAGE)
    for (target, method), scores in found.items():
        wanted = {key: value for key, value in expected.items() if key.endswith(f"/{target}/{method}")}
        assert wanted, f"no oracle of {target}/{method}"
        for key, value in scores.items():
            keep = value >= 0 if target == "experts" else torch.ones_like(value, dtype=torch.bool)
            torch.testing.assert_close(value[keep], wanted[key][keep], rtol=TOLERANCE, atol=1e-12, msg=key)
        never_reached = {key for key in wanted if ".experts.4." in key or ".experts.5." in key}
        assert scores.keys() == wanted.keys() - never_reached, f"{target}/{method}"


@pytest.mark.fast
@pytest.mark.parametrize("pair", NEEDING_JOB, ids="/".join)
def test_what_only_a_job_measures_is_refused_elsewhere(pair: Pair) -> None:
    scores, model = [dict(zip(("target", "method"), pair, strict=True))], TinyDecoder()
    with pytest.raises(ConfigError, match=f"attach can't measure {'/'.join(pair)}: .*torchrun -m megascore score"):
        megascore.attach(model, scores=scores)
    with pytest.raises(ConfigError, match=f"score_blockwise can't measure {'/'.join(pair)}"):
        megascore.score_blockwise(model, None, [], scores)
    assert pair not in {(request.target, request.method) for request in resolve_scores("all")}
