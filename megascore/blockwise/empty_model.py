"""A Hugging Face model without weights, for those that are read when they are needed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from megascore.errors import ModelError

__all__ = ["empty_model", "parameters_on_meta"]


def empty_model(folder: str | Path) -> nn.Module:
    """Build the model of a checkpoint directory with its parameters on the meta device, and its buffers real.

    Buffers that no checkpoint holds, such as rotary tables, are computed when a model is built, and so are right.
    The model is in evaluation mode, in the dtype that its config names.

    Raises:
        ModelError: transformers is not installed, or the folder has no config that it knows.
    """
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            f"the model in {folder} needs transformers ({error}): run pip install 'megascore[huggingface]'."
        ) from error
    if not (Path(folder) / "config.json").is_file():
        raise ModelError(f"model folder {folder} has no config.json: name a Hugging Face checkpoint directory.")
    try:
        # Not given, transformers asks on the terminal whether to run the folder's own code.
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, json.JSONDecodeError) as error:
        if "trust_remote_code" in str(error):
            raise _own_code(folder) from error
        raise ModelError(f"the config in {folder} cannot be used: {error}") from error
    architecture = (getattr(config, "architectures", None) or [""])[0]
    causal = architecture.endswith("ForCausalLM")
    builder: Any = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    dtype = getattr(config, "dtype", None)
    try:
        with parameters_on_meta():
            options = {"dtype": dtype} if dtype is not None else {}
            model: nn.Module = builder.from_config(config, trust_remote_code=False, **options)
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise _own_code(folder) from error
        raise
    return model.eval()


def _own_code(folder: str | Path) -> ModelError:
    return ModelError(
        f"the model in {folder} is code of its own (auto_map in config.json), which megascore does not run: build it "
        "yourself, on the meta device or with its weights, and give the module in place of the folder."
    )


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Have the parameters of every module that is built inside on the meta device, at once; buffers stay real.

    ``torch.device("meta")`` would take the buffers, too, and their content with them.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        # Tied parameters come here a second time, and must stay one.
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=False)
        register(module, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
