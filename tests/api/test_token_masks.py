"""A run's token mask on plain models: padding never counts, whatever it holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import megascore
from megascore.errors import DataError
from megascore.sites.places import batch_first_mask
from tests.mcore.oracle import all_scores
from tests.models import SIZES, load_with_transformers, save_checkpoint

LENGTHS = (12, 1, 7, 4)
STEPS = (slice(0, 2), slice(2, 4))
TOLERANCE = 1e-9
"""In float64 only the order of additions differs."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    folder: Path = save_checkpoint(tmp_path_factory.mktemp("masks") / "llama", "llama")
    loaded: nn.Module = load_with_transformers(folder, torch.float64)
    return loaded


def make_tokens() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, SIZES["vocab_size"], (len(LENGTHS), max(LENGTHS)), generator=generator)


def make_masks() -> Tensor:
    return torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


def score_one_by_one(model: nn.Module) -> megascore.Scores:
    with megascore.attach(model, scores=all_scores(1)[:2] + all_scores(1)[3:]) as run:
        for sample, length in zip(make_tokens(), LENGTHS, strict=True):
            model(sample[None, :length])
        run.step()
    return run.finish()


def test_a_padded_batch_scores_as_its_documents_alone(model: nn.Module) -> None:
    alone = score_one_by_one(model)
    with megascore.attach(model, scores=all_scores(1)[:2] + all_scores(1)[3:]) as run:
        with run.masked(make_masks()):
            model(make_tokens())
        run.step()
    padded = run.finish()
    assert padded.keys() == alone.keys()
    for key, score in alone.items():
        torch.testing.assert_close(padded[key], score, rtol=TOLERANCE, atol=0, msg=key)
    assert padded.metadata["sites"] == alone.metadata["sites"]
    assert padded.metadata["num_tokens"] == sum(LENGTHS)


def test_an_iteration_on_a_padded_batch_prunes_what_the_documents_alone_say(model: nn.Module) -> None:
    ranks = []
    for width, iterations in ((max(LENGTHS), 2), (5, 2)):
        # The second time the padding is shorter: all documents are cut to 5 tokens in both.
        masks = make_masks() & (torch.arange(max(LENGTHS)) < 5)
        with megascore.attach(model, scores=[all_scores(iterations)[2]]) as run:
            for step in STEPS:
                run.token_mask = masks[step, :width]
                model(make_tokens()[step, :width])
                run.step()
        ranks.append(run.finish())
    for key, score in ranks[0].items():
        assert torch.equal(ranks[1][key], score), key


def test_a_mask_in_zeros_and_ones_is_copied_when_it_is_set_and_gone_after_the_block(model: nn.Module) -> None:
    tokens, mask = make_tokens(), make_masks().long()
    with megascore.attach(model, scores=[{"target": "ffn"}]) as run:
        with run.masked(mask):
            mask.zero_()
            model(tokens)
        assert run.token_mask is None
        run.step()
    assert run.finish().metadata["num_tokens"] == sum(LENGTHS)


def test_a_mask_changes_what_is_counted_and_not_what_the_model_computes(model: nn.Module) -> None:
    tokens = make_tokens()
    with torch.no_grad():
        expected = model(tokens).logits
        with megascore.attach(model, recipe="minitron") as run, run.masked(torch.zeros_like(tokens)):
            assert torch.equal(model(tokens).logits, expected)


def test_the_mask_of_another_batch_is_refused_with_both_shapes(model: nn.Module) -> None:
    tokens, mask = make_tokens(), make_masks()
    with megascore.attach(model, scores=[{"target": "ffn"}]) as run:
        for wrong in (mask.T, mask[:, 1:], mask[1:]):
            with run.masked(wrong), pytest.raises(DataError, match=r"\[samples, sequence\], but .* 4 samples of 12"):
                model(tokens)


def test_what_is_no_mask_is_refused(model: nn.Module) -> None:
    with megascore.attach(model, scores=[{"target": "ffn"}]) as run:
        # Such as transformers adds to the attention's scores.
        with pytest.raises(DataError, match=r"torch.float32 \[4, 12\]: expected bool"):
            run.token_mask = torch.zeros(4, 12)
        with pytest.raises(DataError, match=r"\[4, 1, 12, 12\]"):
            run.token_mask = torch.ones(4, 1, 12, 12, dtype=torch.bool)


def test_the_mask_of_flattened_tokens_is_flattened_alike() -> None:
    mask = make_masks()
    assert torch.equal(batch_first_mask(mask, torch.zeros(mask.numel(), 3)), mask.flatten())
    with pytest.raises(DataError, match="the model runs 7 tokens"):
        batch_first_mask(mask, torch.zeros(7, 3))
