"""The places of a mixture-of-experts layer of Megatron-Core: its routed experts and the channels inside them.

Megatron multiplies by the router's weight inside an expert, between activation and output projection (or on the
expert's input, with ``moe_apply_probs_on_input``). So the tensors seen here are weighted already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megascore.errors import LayoutError, ModelError
from megascore.mcore.compat import size_of_expert_output
from megascore.mcore.sites.masks import DispatchedMask, rows_of_expert
from megascore.mcore.world.groups import DenseGroups, ExpertGroups
from megascore.parallel.axes import Axis, Placement, Role, Shard
from megascore.sites.places import LocalMask, Place, Reader, first_tensor
from megascore.sites.targets import PlaceKind
from megascore.sites.weight_alone import WeightAlone

__all__ = ["expert_facts", "expert_layout", "expert_places", "padding_of_experts"]

PADDING = (
    "moe_pad_expert_input_to_capacity",
    "moe_router_padding_for_quantization",
    "moe_router_padding_for_fp8",
    "moe_expert_rank_capacity_factor",
    "moe_use_grouped_tensor",
    "fp8",
    "fp4",
)
"""Fields of Megatron's ``TransformerConfig``, each of some versions, with which experts are given more than tokens."""


def expert_places(
    moe_layer: MoELayer, name: str, path: str, dense: DenseGroups, local_mask: LocalMask
) -> Iterator[Place]:
    """Yield the places of a layer's routed experts that live on this rank: all experts together, then each one's FFN.

    Args:
        moe_layer: The layer.
        name: Its global name, ``decoder.layers.{number}.mlp``.
        path: Its name in this rank's module tree.
        dense: Groups of the dense layers around it.
        local_mask: Mask of the hidden states that the layer is given.

    Raises:
        LayoutError: the experts do not split evenly.
    """
    experts, groups = moe_layer.experts, ExpertGroups.of(moe_layer, dense)
    copies = _copies_of_tokens(moe_layer.config, dense)
    num_local, num_global = int(moe_layer.num_local_experts), int(moe_layer.config.num_moe_experts)
    first = groups.axis("ep").rank * num_local
    if num_local * groups.axis("ep").size != num_global:
        raise LayoutError(
            f"{name} has {num_local} experts on this rank of {groups.axis('ep').size} expert-parallel ones, "
            f"which is not {num_global} experts in all."
        )
    together = Placement.whole(num_global, _roles(groups, ep=Role.SUM, etp=Role.SAME), copies)
    read = _read_all_experts(first, num_local, bool(moe_layer.config.moe_apply_probs_on_input))
    masks = DispatchedMask(moe_layer, name, local_mask)
    common: dict[str, Any] = {
        "groups": groups.larger_than_one("ep", "etp", "edp"),
        "mask_follower": masks,
        "obstacle": padding_of_experts(moe_layer.config),
    }
    yield Place(
        PlaceKind.ROUTED_EXPERTS,
        f"{name}.experts",
        experts,
        f"{path}.experts",
        together,
        read,
        local_mask=masks.of_layer,
        num_features=size_of_expert_output(moe_layer.config),
        **common,
    )
    for position, (module_name, module, width, read, alone) in enumerate(_projections(experts, num_local)):
        inside = _place_inside_expert(name, width, moe_layer.config, groups, copies)
        expert_name = f"{name}.experts.{first + position}.linear_fc2"
        local_name = f"{path}.experts{module_name}"
        yield Place(
            PlaceKind.ROUTED_EXPERT_PROJECTION,
            expert_name,
            module,
            local_name,
            inside,
            read,
            local_mask=masks.of_expert(position),
            scored_module=alone,
            **common,
        )


def expert_facts(config: TransformerConfig) -> Mapping[str, Any]:
    """Return the sizes of a model's experts; empty for a dense model."""
    if not config.num_moe_experts:
        return {}
    return {
        "num_experts": config.num_moe_experts,
        "experts_per_token": config.moe_router_topk,
        "expert_ffn_size": config.moe_ffn_hidden_size,
        "shared_expert_ffn_size": config.moe_shared_expert_intermediate_size or 0,
    }


def expert_layout(config: TransformerConfig) -> Mapping[str, int]:
    """Return the degrees of the expert axes; empty for a dense model."""
    if not config.num_moe_experts:
        return {}
    return {"expert": config.expert_model_parallel_size, "expert_tensor": config.expert_tensor_parallel_size}


def padding_of_experts(config: TransformerConfig) -> str | None:
    """Return why experts cannot be scored where they are given what is no token, so that tokens cannot be counted."""
    padded = [name for name in PADDING if getattr(config, name, None)]
    if not padded:
        return None
    return (
        f"with {', '.join(padded)} set, experts are given padding that cannot be told from tokens. Set it to False "
        "(None where it is a number or a name) in the TransformerConfig to score experts."
    )


def _copies_of_tokens(config: TransformerConfig, dense: DenseGroups) -> int:
    """Return how often each token reaches its experts.

    Without sequence parallelism all tensor-parallel ranks hold the same tokens, and each sends all of them.
    """
    return 1 if config.sequence_parallel else dense.axis("tp").size


def _roles(groups: ExpertGroups, ep: Role, etp: Role) -> tuple[tuple[Axis, Role], ...]:
    return (
        (groups.axis("ep"), ep),
        (groups.axis("etp"), etp),
        (groups.axis("edp"), Role.SUM),
        (groups.axis("pp"), Role.OWN),
    )


def _place_inside_expert(
    name: str, width: int | None, config: TransformerConfig, groups: ExpertGroups, copies: int
) -> Placement:
    """Return the roles at the input of an expert's output projection, which has ``width`` columns on this rank.

    None: only the config tells.
    """
    etp, said = groups.axis("etp"), int(config.moe_ffn_hidden_size)
    width = said // etp.size if width is None else width
    total = width * etp.size
    if total != said:
        raise LayoutError(
            f"{name}: experts have {width} channels on each of {etp.size} expert-tensor-parallel ranks, but "
            f"moe_ffn_hidden_size is {said}: bring the two together."
        )
    roles = _roles(groups, ep=Role.OWN, etp=Role.SHARD)
    return Placement(Shard(etp.rank * width, width, total), roles, copies)


_Projection = tuple[str, nn.Module, "int | None", Reader, "Callable[[], nn.Module] | None"]


def _projections(experts: Any, num_local: int) -> Iterator[_Projection]:
    """Yield name, module, columns, reader and the weight alone, for the inputs of local experts' output projections.

    There are none in experts of unknown classes.
    """
    if hasattr(experts, "local_experts"):  # SequentialMLP
        for position, expert in enumerate(experts.local_experts):
            linear = expert.linear_fc2
            yield f".local_experts.{position}.linear_fc2", linear, linear.weight.shape[1], _read_linear, None
    elif hasattr(experts, "linear_fc2"):  # TEGroupedMLP
        linear = experts.linear_fc2
        for position in range(num_local):
            # Of the versions of Transformer Engine that keep all experts in one tensor, only the config says it.
            weight = getattr(linear, f"weight{position}", None)
            width = None if weight is None else weight.shape[1]
            alone = None if weight is None else partial(_weight_alone, linear, position)
            yield ".linear_fc2", linear, width, _read_grouped_linear(position), alone
    elif hasattr(experts, "weight1"):  # GroupedMLP
        width = experts.weight2.numel() // num_local // experts.config.hidden_size
        for position in range(num_local):
            alone = partial(_part_of_weight2, experts, num_local, width, position)
            yield "", experts, width, _read_grouped_weights(experts, position), alone


def _weight_alone(linear: nn.Module, position: int) -> nn.Module:
    """Return a grouped layer's weight of one expert, as it is now: layer by layer it is another one each time."""
    return WeightAlone(getattr(linear, f"weight{position}"))


def _part_of_weight2(experts: Any, num_local: int, width: int, position: int) -> nn.Module:
    return WeightAlone(experts.weight2.view(num_local, width, -1)[position].detach().T)


def _read_all_experts(first: int, num_local: int, weights_inputs: bool) -> Reader:
    """Return a reader of an experts module: expert and router's weight of each token [T, 2], and outputs [T, H].

    The outputs are weighted. Where that follows from weighted inputs, or weights are not given, the experts alone are
    returned, [T] int64.
    """

    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[Tensor, Tensor]:
        outputs = first_tensor(output)
        # The counts are on the CPU; this way neither they nor the number of tokens make the host wait.
        counts = torch.as_tensor(_argument(args, kwargs, 1, "tokens_per_expert"))
        if counts.device.type == "cpu" and int(counts.sum()) != len(outputs):
            raise ModelError(
                f"experts {first} to {first + num_local - 1} return {len(outputs)} rows for {int(counts.sum())} "
                "tokens: they are given padding that cannot be told from tokens. Set what pads them in the "
                "TransformerConfig to False, or leave experts out of the scores."
            )
        counts = counts.to(outputs.device, non_blocking=True)
        numbers = torch.arange(first, first + num_local, device=outputs.device)
        experts = torch.repeat_interleave(numbers, counts, output_size=len(outputs))
        weights = args[2] if len(args) > 2 else kwargs.get("permuted_probs")
        if weights is None or weights_inputs:
            return experts, outputs
        return torch.stack([experts.double(), weights.double()], dim=1), outputs

    return read


def _read_linear(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[Tensor, Tensor]:
    return args[0], first_tensor(output)


def _read_grouped_linear(position: int) -> Reader:
    """Return a reader of one expert's part of Transformer Engine's grouped linear layer, called ``(x, m_splits)``."""

    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[Tensor, Tensor]:
        tokens = rows_of_expert(position, _argument(args, kwargs, 1, "m_splits"))
        return args[0][tokens], first_tensor(output)[tokens]

    return read


def _read_grouped_weights(experts: nn.Module, position: int) -> Reader:
    """Return a reader of one expert of Megatron's GroupedMLP, whose intermediate activations never leave its kernels.

    They are computed again, at the cost of the expert's first projection; the model's own pass stays.
    """

    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[Tensor, Tensor]:
        tokens = rows_of_expert(position, _argument(args, kwargs, 1, "tokens_per_expert"))
        hidden, weights = args[0][tokens], _argument(args, kwargs, 2, "permuted_probs")[tokens].unsqueeze(-1)
        config: Any = experts.config
        if config.moe_apply_probs_on_input:
            hidden, weights = (weights * hidden).to(hidden.dtype), torch.ones_like(weights)
        weight1: Tensor = experts.weight1.view(experts.num_local_experts, config.hidden_size, -1)  # type: ignore
        return experts.activation_func_with_probs(hidden @ weight1[position], weights), first_tensor(output)[tokens]  # type: ignore

    return read


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs[name]
