"""Megatron checkpoints in the ``torch_dist`` format, saved by Megatron itself, on the CPU."""

from __future__ import annotations

import argparse
import enum
import io
import pickle
import queue
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

__all__ = ["Colour", "move_common", "save_torch_dist", "training_args"]


class Colour(enum.Enum):
    """Something that only the program that saved a checkpoint knows."""

    RED = 1


def save_torch_dist(
    chunks: Sequence[Any], folder: Path, *, args: Any = None, metadata: dict[str, Any] | None = None, **common: Any
) -> None:
    """Save a model as Megatron-LM does, without an optimizer.

    Collective over the world; inside a `parallel_world`.

    Args:
        chunks: The model chunks of this rank.
        folder: Made by rank 0.
        args: Kept in common.pt, as Megatron-LM keeps its command line.
        metadata: Of Megatron's ``sharded_state_dict``: which of its ways to name things.
        common: More for common.pt.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    names = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    state = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in zip(names, chunks, strict=True)}
    with _writing_in_this_process():
        dist_checkpointing.save(
            {**state, "args": args, "checkpoint_version": 3.0, **common},
            str(folder),
            TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1),
        )


@contextmanager
def _writing_in_this_process() -> Iterator[None]:
    """Up to 0.16 Megatron writes from processes that it forks: not allowed in daemons, as the pool's workers are.

    Since then it does so in threads, and hands the results over through yet another process.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    def write(transforms: Any, use_msc: bool, rank: int, buckets: list[Any], results: queue.Queue[Any]) -> None:
        written = {}
        for number, bucket in enumerate(buckets):
            outcomes: queue.Queue[Any] = queue.Queue()
            counts: queue.Queue[Any] = queue.Queue()
            counts.put(number)
            FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, outcomes, counts, True)
            written[number] = outcomes.get()[1]
        results.put(written)

    one_queue: queue.Queue[Any] = queue.Queue()
    with ExitStack() as stack:
        for owner, name, value in (
            (filesystem_async, "_get_write_results_queue", lambda *_: one_queue),
            (filesystem_async, "get_write_results_queue", lambda *_: one_queue),
            # Needs psutil, for a line of its debug log.
            (filesystem_async, "_process_memory", lambda: 0),
            (FileSystemWriterAsync, "write_preloaded_data_multiproc", staticmethod(write)),
        ):
            if hasattr(owner, name):
                stack.enter_context(mock.patch.object(owner, name, value))
        yield


def move_common(folder: Path, common: Any = None) -> None:
    """Put what is in common.pt among the weights, as Megatron-Core does from 0.19 on.

    Args:
        folder: A checkpoint.
        common: To be there instead.
    """
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    if common is None:
        common = torch.load(folder / "common.pt", weights_only=False)
    (folder / "common.pt").unlink()
    written, shard, name = io.BytesIO(), folder / "__0_0.distcp", "common_state/shard_0_1"
    torch.save([common], written)
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.state_dict_metadata[name] = BytesStorageMetadata()
    index.storage_data[MetadataIndex(name)] = _StorageInfo(shard.name, shard.stat().st_size, written.tell())
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with shard.open("ab") as file:
        file.write(written.getvalue())


def training_args(directory: Path, **changes: Any) -> argparse.Namespace:
    """Return the command line that Megatron-LM would have been given for a model of the tests."""
    from megascore.weights.huggingface.config import read_config

    config = read_config(directory)
    model = config.architecture
    values: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_size,
        "num_attention_heads": model.num_heads,
        "group_query_attention": True,
        "num_query_groups": model.num_kv_heads,
        "kv_channels": config.head_dim,
        "padded_vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_positions,
        "normalization": "RMSNorm",
        "norm_epsilon": model.transformer["layernorm_epsilon"],
        "swiglu": True,
        "add_bias_linear": config.attention_output_bias or config.mlp_bias,
        "add_qkv_bias": config.qkv_bias,
        "qk_layernorm": config.qk_norm,
        "untie_embeddings_and_output_weights": not config.tied_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": model.gpt["rotary_base"],
        "params_dtype": torch.bfloat16,
        "tensor_model_parallel_size": 1,
    }
    if model.experts is not None:
        values |= {
            "num_experts": model.experts.num_experts,
            "moe_ffn_hidden_size": model.experts.ffn_size,
            "moe_router_topk": model.transformer["moe_router_topk"],
            "moe_router_pre_softmax": model.transformer["moe_router_pre_softmax"],
            "moe_layer_freq": 1 if all(model.experts.layers) else [int(has) for has in model.experts.layers],
        }
    return argparse.Namespace(**{**values, **changes})
