"""Routed experts of plain models, whose weights are three-dimensional tensors of all experts of a layer together.

transformers (from version 5 on) writes a layer's experts as one module that is called with the tokens, the experts of
each token and their weights. What happens inside is no module of its own, so it is computed again here, with the
module's own gate and in its own layout; the model's own pass stays. The router's weight multiplies the activations
before the output projection, as in Megatron-Core, so that scores are the same in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megascore.errors import ModelError
from megascore.sites.places import mask_mismatch
from megascore.sites.weight_alone import WeightAlone

__all__ = ["ExpertReader", "FusedExperts"]

ARGUMENTS = (("hidden_states",), ("top_k_index", "router_indices"), ("top_k_weights", "routing_weights"))
"""Names of the arguments of such a module, in order: tokens, the experts of each token, and the router's weights."""
ROUNDING = 0.05
"""Half precision keeps 2 to 3 digits, and a token's experts are added in another order; a wrong formula is off by as
much as the output itself."""


class FusedExperts:
    """What is known of a module with the weights of all routed experts of a layer."""

    def __init__(self, name: str, module: nn.Module) -> None:
        """Read the sizes from the weights; `is_one` must be true of the module."""
        self.name = name
        self.module: Any = module
        shape: tuple[int, ...] = tuple(getattr(module, "down_proj").shape)  # noqa: B009 - a tensor, as is_one has seen
        self.num_experts = shape[0]
        is_transposed: bool = getattr(module, "is_transposed")  # noqa: B009
        self.ffn_size, self.num_features = (shape[1], shape[2]) if is_transposed else (shape[2], shape[1])

    @staticmethod
    def is_one(module: nn.Module) -> bool:
        """Tell whether a module says all that is needed to compute what happens inside of it."""
        weights = module._parameters
        first = weights.get("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj")
        down = weights.get("down_proj")
        told = all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias"))
        return told and first is not None and down is not None and first.dim() == 3 and down.dim() == 3

    def routing(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens [T, H], their experts [T, k] int64, and the router's weights [T, k].

        Raises:
            ModelError: the call has no such arguments, or experts are spread over ranks.
        """
        given = list(args)
        for names in ARGUMENTS[len(given) :]:
            given += [kwargs[name] for name in names if name in kwargs]
        if len(given) != len(ARGUMENTS) or given[1].shape != given[2].shape:
            raise ModelError(
                f"{self.name} ({type(self.module).__name__}) was called with {len(args)} arguments and "
                f"{', '.join(kwargs) or 'no'} keywords: expected the tokens, the experts of each, and the router's "
                "weights. Leave experts and expert_ffn out of the scores."
            )
        if getattr(self.module, "_is_expert_parallel", False):
            raise ModelError(
                f"{self.name}: transformers has spread the experts over ranks, and a plain model is scored as a whole "
                "on each of them: load it without tp_plan and expert parallelism, or score it in Megatron-Core."
            )
        hidden = given[0]
        return hidden.reshape(-1, hidden.shape[-1]), given[1], given[2]

    def projection(self, expert: int) -> WeightAlone:
        """Return a module with the weight [H, F] of an expert's output projection."""
        weight = self.module.down_proj[expert].detach()
        return WeightAlone(weight.T if self.module.is_transposed else weight)

    def inside(self, expert: int, tokens: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted input [n, F] of an expert's output projection for its tokens [n, H]."""
        activated = self._activated(expert, tokens)
        return activated * weights.to(activated.dtype).unsqueeze(-1)

    def outputs(self, expert: int, tokens: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted output [n, H] of an expert for its tokens [n, H]."""
        output = self._linear("down_proj", expert, self._activated(expert, tokens))
        if getattr(self.module, "has_post_expert_norm", False):
            output = self.module.post_expert_norm(output)
        return output * weights.to(output.dtype).unsqueeze(-1)

    def _activated(self, expert: int, tokens: Tensor) -> Tensor:
        module = self.module
        first = self._linear("gate_up_proj" if module.has_gate else "up_proj", expert, tokens)
        activated: Tensor = module._apply_gate(first) if module.has_gate else module.act_fn(first)
        return activated

    def _linear(self, name: str, expert: int, inputs: Tensor) -> Tensor:
        weight = getattr(self.module, name)[expert]
        output: Tensor = inputs @ (weight if self.module.is_transposed else weight.T)
        return output + getattr(self.module, f"{name}_bias")[expert] if self.module.has_bias else output


class ExpertReader:
    """Reads one call of a layer's experts for all of them together, or for the channels inside one.

    A call and its mask belong together: `mask` is of the tokens that the last `read` has found.
    """

    def __init__(self, experts: FusedExperts, expert: int | None = None) -> None:
        """Read for one expert, or for all of them where none is given."""
        self._experts = experts
        self._expert = expert
        self._is_checked = False
        self._tokens_of_rows = torch.empty(0, dtype=torch.int64)
        self._num_tokens = 0

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[Tensor, Tensor]:
        """Return what one expert's output projection is given, twice [n, F]; of all experts together two other things.

        These are the expert and the router's weight of each row, [N, 2] float64, and its weighted output [N, H].

        Raises:
            ModelError: the module computes something else than what is computed here.
        """
        hidden, index, weights = self._experts.routing(args, kwargs)
        self._num_tokens = len(hidden)
        if self._expert is not None:
            self._tokens_of_rows, position = (index == self._expert).nonzero(as_tuple=True)
            tokens = hidden[self._tokens_of_rows]
            inside = self._experts.inside(self._expert, tokens, weights[self._tokens_of_rows, position])
            return inside, inside
        rows = index.reshape(-1)
        self._tokens_of_rows = torch.arange(len(hidden), device=index.device).repeat_interleave(index.shape[-1])
        outputs = hidden.new_zeros(len(rows), hidden.shape[-1])
        for expert in range(self._experts.num_experts):
            chosen = (rows == expert).nonzero().flatten()
            tokens = hidden[self._tokens_of_rows[chosen]]
            outputs[chosen] = self._experts.outputs(expert, tokens, weights.reshape(-1)[chosen]).to(outputs.dtype)
        if not self._is_checked:
            self._check(outputs, output)
            self._is_checked = True
        return torch.stack([rows.double(), weights.reshape(-1).double()], dim=1), outputs

    def mask(self, mask: Tensor, activations: Tensor) -> Tensor:
        """Return which rows of the last call count: bool [N], of the mask of the batch, bool [B, S]."""
        if mask.numel() != self._num_tokens:
            raise mask_mismatch(mask, activations)
        return mask.reshape(-1)[self._tokens_of_rows]

    def _check(self, outputs: Tensor, output: Tensor) -> None:
        summed = outputs.view(self._num_tokens, -1, outputs.shape[-1]).double().sum(1)
        given = output.reshape(summed.shape).double()
        if not float((summed - given).norm()) <= ROUNDING * float(given.norm()) and bool(given.isfinite().all()):
            raise ModelError(
                f"{self._experts.name} ({type(self._experts.module).__name__}) does not return the sum of its experts' "
                "outputs times the router's weights, so that single experts can't be scored. Leave experts and "
                "expert_ffn out of the scores."
            )
