"""Standard errors and expected overlaps, against what many runs on other data really give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import megascore
from megascore.scores.uncertainty import Measured, Uncertainty, uncertainties
from tests.blockwise.tiny_decoder import TinyDecoder, make_batches

pytestmark = pytest.mark.fast

NUM_GROUPS, NUM_UNITS = 8, 64


def uncertainty_of(
    score: Tensor, replicates: Tensor, num_tokens: int, num_competing: int = 1, unseen: tuple[int, ...] = ()
) -> Uncertainty | None:
    return uncertainties({"it": Measured(score, replicates, num_competing, unseen)}, num_tokens).get("it")


def replicates_of(samples: Tensor) -> tuple[Tensor, Tensor]:
    """From samples [n, units]: the mean, and the means without each of the groups, sample number mod 8."""
    groups = torch.arange(len(samples)) % NUM_GROUPS
    return samples.mean(0), torch.stack([samples[groups != group].mean(0) for group in range(NUM_GROUPS)])


def draw(seed: int, num_samples: int = 64) -> Tensor:
    """Samples whose units differ in their mean by less than one sample scatters."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.linspace(1, 2, NUM_UNITS, dtype=torch.float64)
    return true + torch.randn(num_samples, NUM_UNITS, dtype=torch.float64, generator=generator)


def overlap(a: Tensor, b: Tensor) -> float:
    count = NUM_UNITS // 4
    return len(set(a.argsort()[:count].tolist()) & set(b.argsort()[:count].tolist())) / count


def test_errors_and_overlap_are_those_of_twenty_runs_on_other_data() -> None:
    runs = [draw(seed) for seed in range(20)]
    found = [uncertainty_of(*replicates_of(samples), num_tokens=64) for samples in runs]
    means = torch.stack([samples.mean(0) for samples in runs])
    errors = torch.stack([own.standard_error for own in found if own is not None])
    # 20 runs of 64 units: the root mean square is known to 2 %, and the jackknife's own scatter is averaged.
    assert float(errors.square().mean().sqrt() / means.std(0).square().mean().sqrt()) == pytest.approx(1, abs=0.08)
    true = [overlap(a, b) for number, a in enumerate(means) for b in means[:number]]
    expected = [own.overlap for own in found if own is not None and own.overlap is not None]
    assert len(expected) == 20
    # One run's own estimate scatters by some 0.04.
    assert sum(expected) / 20 == pytest.approx(sum(true) / len(true), abs=0.04)


def test_the_tokens_for_an_overlap_reach_it() -> None:
    short = [uncertainty_of(*replicates_of(draw(seed)), num_tokens=64) for seed in range(10)]
    wanted = 0.92
    tokens = [own.tokens_for(wanted) for own in short if own is not None]
    needed = sorted(number for number in tokens if number is not None)[5]
    true = [overlap(draw(100 + n, needed).mean(0), draw(200 + n, needed).mean(0)) for n in range(20)]
    assert sum(true) / 20 == pytest.approx(wanted, abs=0.05)
    assert short[0] is not None
    assert short[0].tokens_for(0.01) == 64
    with pytest.raises(ValueError, match="overlap is 1: expected a number between 0 and 1"):
        short[0].tokens_for(1)


def test_units_that_do_not_compete_and_runs_of_one_group_tell_nothing() -> None:
    mean, replicates = replicates_of(draw(0))
    alone = uncertainty_of(mean, replicates, 64, num_competing=NUM_UNITS)
    assert alone is not None
    assert alone.overlap is None
    assert alone.tokens_for(0.9) is None
    assert uncertainty_of(mean, replicates[:1], 64) is None
    certain = uncertainty_of(mean, mean.expand(8, -1).clone(), 64, num_competing=4, unseen=(0,))
    assert certain is not None
    assert certain.overlap == 1
    assert certain.tokens_for(0.9) == 64


SOME = [
    {"target": "ffn", "method": "l2_norm"},
    {"target": "ffn", "method": "fluctuation"},
    {"target": "attention_heads", "method": "independent_contribution"},
    {"target": "hidden_size", "method": "l2_l2"},
    {"target": "layers"},
]


def run_scores(num_steps: int, batches: list[Tensor]) -> megascore.Scores:
    model = TinyDecoder()
    with megascore.attach(model, scores=SOME) as run, torch.no_grad():
        for step in range(num_steps):
            for batch in batches[step::num_steps]:
                model(batch)
            run.step()
    return run.finish()


def test_each_vector_of_a_run_has_its_error_and_short_runs_have_fewer_groups() -> None:
    scores = run_scores(4, make_batches(4))
    assert set(scores.uncertainty) == set(scores)
    for key, own in scores.uncertainty.items():
        assert own.num_groups == 4
        assert own.num_tokens == scores.metadata["num_tokens"]
        assert own.standard_error.shape == scores[key].shape
        assert bool((own.standard_error >= 0).all()), key
    assert not run_scores(1, make_batches(4)).uncertainty


def test_the_error_is_the_jackknife_of_runs_without_each_group() -> None:
    """From the definition: the same model on the data of all steps but those of one group."""
    batches = make_batches(10)
    whole = run_scores(10, batches)
    rest = []
    for group in range(8):
        steps = [step for step in range(10) if step % 8 != group]
        scores = run_scores(len(steps), [batches[step] for step in steps])
        # What grows with the data is compared as if there were as much of it.
        of_all, own = whole.metadata, scores.metadata
        scale = {
            "l2_norm": (of_all["num_samples"] / own["num_samples"]) ** 0.5,
            "l2_l2": (of_all["num_tokens"] / own["num_tokens"]) ** 0.5,
        }
        rest.append({key: value * scale.get(key.split("/")[2], 1) for key, value in scores.items()})
    for key, own in whole.uncertainty.items():
        values = torch.stack([scores[key] for scores in rest])
        wanted = ((values - values.mean(0)).square().sum(0) * 7 / 8).sqrt()
        torch.testing.assert_close(own.standard_error, wanted, rtol=1e-5, atol=1e-9, msg=key)
