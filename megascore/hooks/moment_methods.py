"""Methods whose score follows from moments of an activation and from the norms of weights, each a hook of its own.

``x[t, c]`` is channel c at token t, ``W[:, c]`` the column of the output projection that it meets; means and variances
are over all tokens that count. ``mean`` and ``l2``, of a sequence and then of samples, are the aggregations of table 11
of Minitron (arXiv:2407.14679): ``l2_mean`` is the norm over the sequence, averaged over samples.
"""

from __future__ import annotations

from torch import Tensor

from megascore.hooks.moments import MomentsHook
from megascore.hooks.statistics import State

__all__ = [
    "FluctuationHook",
    "L2L2Hook",
    "L2MeanHook",
    "L2NormHook",
    "MeanMeanHook",
    "RoutedL2NormHook",
    "RoutedMeanHook",
    "VarianceHook",
    "WandaHook",
    "WeightNormHook",
]

PROJECTIONS = ("ffn", "attention_heads", "shared_expert_ffn")


class L2NormHook(
    MomentsHook,
    method="l2_norm",
    targets=("ffn", "attention_heads", "hidden_size", "shared_expert_ffn"),
    summary="norm over samples of the mean absolute activation of each sample",
):
    """Scores channels by the activations of a module's input, sequence first.

    ``a[b, c]`` is the mean over the sequence of ``abs(x[s, b, c])``, the score ``sqrt(sum over b of a[b, c]^2)``.
    It depends on what a sample is (a whole sequence), not on how samples are batched. A two-dimensional input is one
    sample. Samples without a token that counts add nothing.
    """

    keeps = ("sum_of_squared_means",)
    grows_with = "num_samples"

    @classmethod
    def compute(cls, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        """Return ``score`` [C]; ``num_calls`` has no part in it, as samples are added, not averaged."""
        cls._require_data(state)
        return {"score": state["sum_of_squared_means"].sqrt()}


class RoutedL2NormHook(
    MomentsHook, method="l2_norm", targets=("expert_ffn",), summary="norm over the routed tokens, each its own sample"
):
    """Scores channels by the tokens routed to a module: ``sqrt(sum over tokens of x^2)``.

    This is `L2NormHook` where each token is a sample of its own. The tokens of an expert come from all sequences and
    ranks in no order, so there is no sequence to take a mean over.
    """

    routed = True
    keeps = ("sum_of_squares",)

    @classmethod
    def compute(cls, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        """Return ``score`` [C]; ``num_calls`` has no part in it, as tokens are added, not averaged."""
        cls._require_data(state)
        return {"score": state["sum_of_squares"].sqrt()}


class MeanMeanHook(
    MomentsHook,
    method="mean_mean",
    targets=(*PROJECTIONS, "hidden_size"),
    summary="mean over samples of the mean absolute activation of each sample",
):
    """Scores channels: ``mean over b of (mean over s of abs(x[s, b, c]))``."""

    keeps = ("sum_of_means",)

    @classmethod
    def compute(cls, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        """Return ``score`` [C]."""
        cls._require_data(state)
        return {"score": state["sum_of_means"] / state["num_samples"]}


class RoutedMeanHook(
    MomentsHook, method="mean_mean", targets=("expert_ffn",), summary="mean absolute activation of the routed tokens"
):
    """Scores channels by the tokens routed to a module: ``mean over tokens of abs(x[t, c])``."""

    routed = True
    keeps = ("sum_of_abs",)

    @classmethod
    def compute(cls, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        """Return ``score`` [C]."""
        cls._require_data(state)
        return {"score": state["sum_of_abs"] / state["num_tokens"]}


class L2MeanHook(
    MomentsHook,
    method="l2_mean",
    targets=(*PROJECTIONS, "hidden_size"),
    summary="mean over samples of the norm of the activations of each sample",
):
    """Scores channels: ``mean over b of sqrt(sum over s of x[s, b, c]^2)``."""

    keeps = ("sum_of_norms",)

    @classmethod
    def compute(cls, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        """Return ``score`` [C]."""
        cls._require_data(state)
        return {"score": state["sum_of_norms"] / state["num_samples"]}


class L2L2Hook(
    MomentsHook,
    method="l2_l2",
    targets=(*PROJECTIONS, "hidden_size"),
    summary="norm over samples of the norm of the activations of each sample",
):
    """Scores channels: ``sqrt(sum over b and s of x[s, b, c]^2)``."""

    keeps = ("sum_of_squares",)

    @classmethod
    def compute(cls, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        """Return ``score`` [C]."""
        cls._require_data(state)
        return {"score": state["sum_of_squares"].sqrt()}


class VarianceHook(
    MomentsHook,
    method="variance",
    targets=(*PROJECTIONS, "expert_ffn", "hidden_size"),
    summary="variance of the activation over tokens",
):
    """Scores channels: ``mean of x^2 - (mean of x)^2``."""

    keeps = ("sum_of_values", "sum_of_squares")

    @classmethod
    def compute(cls, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        """Return ``score`` [C]."""
        cls._require_data(state)
        return {"score": _variance(state)}


class WandaHook(
    MomentsHook,
    method="wanda",
    targets=(*PROJECTIONS, "expert_ffn"),
    summary="norm of the weight's column times the root mean square of the activation",
):
    """Scores channels: ``norm2(W[:, c]) * sqrt(mean of x^2)``: Wanda's metric (arXiv:2306.11695) of whole columns."""

    keeps = ("weight_norm", "sum_of_squares")

    @classmethod
    def compute(cls, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        """Return ``score`` [C]."""
        cls._require_data(state)
        return {"score": state["weight_norm"] * (state["sum_of_squares"] / state["num_tokens"]).sqrt()}


class FluctuationHook(
    MomentsHook,
    method="fluctuation",
    targets=(*PROJECTIONS, "expert_ffn"),
    summary="squared norm of the weight's column times the variance of the activation",
):
    """Scores channels: ``norm2(W[:, c])^2 * variance of x``: WIFV of FLAP (arXiv:2312.11983).

    It is what the output loses where the channel's mean stays, as a bias.
    """

    keeps = ("weight_norm", "sum_of_values", "sum_of_squares")

    @classmethod
    def compute(cls, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        """Return ``score`` [C]."""
        cls._require_data(state)
        return {"score": state["weight_norm"].square() * _variance(state)}


class WeightNormHook(
    MomentsHook, method="weight_norm", targets=(*PROJECTIONS, "expert_ffn"), summary="norm of the weight's column"
):
    """Scores channels: ``norm2(W[:, c])``, whatever the data."""

    reads_activations = False
    keeps = ("weight_norm",)

    @classmethod
    def compute(cls, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        """Return ``score`` [C]."""
        cls._require_data(state)
        return {"score": state["weight_norm"]}


def _variance(state: State) -> Tensor:
    mean = state["sum_of_values"] / state["num_tokens"]
    return (state["sum_of_squares"] / state["num_tokens"] - mean.square()).clamp(min=0)
