"""The tokenizer of a ``tokenizer.json`` as the file has it, whatever transformers makes of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from megascore.errors import ModelError

__all__ = ["FileTokenizer", "ids_of_text"]

logger = logging.getLogger(__name__)

NUM_COMPARED = 16
"""Texts at whose beginnings transformers is asked, too: only for a warning, as the ids are the file's in any case."""
COMPARED_CHARACTERS = 2000
SHOWN_IDS = 12
AS_IT_IS = "transformers.PreTrainedTokenizerFast.from_pretrained(folder)"
"""What takes tokenizer.json as it is. The same name as tokenizer_class in tokenizer_config.json does not: transformers
5.24 overrides it for model_type qwen2."""


class FileTokenizer:
    """Tokenizes as the file says, and puts those special tokens around a text that transformers does.

    Which these are is in no single file: transformers reads them from tokenizer_config.json, too. What lies between
    them it can get wrong, as it builds the tokenizers of some families anew from the vocabulary alone.
    """

    def __init__(self, path: Path, tokenizer: Any) -> None:
        """Load the file.

        Args:
            path: The ``tokenizer.json``.
            tokenizer: What transformers loads from its folder.

        Raises:
            ModelError: the file cannot be loaded, or transformers adds special tokens that it does not have.
        """
        from tokenizers import Tokenizer

        try:
            self._file = Tokenizer.from_file(str(path))
        except Exception as error:  # The Rust tokenizers raise bare Exception for a damaged file.
            raise ModelError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
        # A text may be longer than the model's context: it is cut into samples afterwards.
        self._file.no_truncation()
        self._file.no_padding()
        self._path = path
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        around = None if backend is None else backend.post_processor
        self._is_in_rust, self._adds_special = backend is not None, around is not None
        if around is not None:
            self._file.post_processor = around
        self._num_compared = 0
        for token in self._file.encode("", add_special_tokens=self._adds_special).ids:
            self._check_token(token, "puts around a text")

    def end(self) -> int | None:
        """Return the end-of-text token; None if there is none.

        Raises:
            ModelError: the file does not have it, or has it under another id.
        """
        end: int | None = self._tokenizer.eos_token_id
        if end is not None:
            self._check_token(end, "takes for the end of a text")
        return end

    def ids(self, text: str, special: bool) -> list[int]:
        """Return the ids of a text, with special tokens around it if ``special``.

        Warns of the first text that transformers tokenizes otherwise, among the beginnings of some.

        Raises:
            ModelError: it does so with a tokenizer in Python, whose special tokens cannot be put around other ids.
        """
        if not self._is_in_rust:
            self._refuse_difference(text)
            return ids_of_text(self._tokenizer, text, special)
        if self._num_compared < NUM_COMPARED:
            self._warn_of_difference(text[:COMPARED_CHARACTERS])
        ids: list[int] = self._file.encode(text, add_special_tokens=special and self._adds_special).ids
        return ids

    def _difference(self, text: str) -> str | None:
        """Return where transformers begins to tokenize otherwise, with both ids; None where it does not."""
        encoding = self._file.encode(text, add_special_tokens=False)
        other = ids_of_text(self._tokenizer, text, special=False)
        if encoding.ids == other:
            return None
        pairs = zip(encoding.ids, other, strict=False)
        start = next((at for at, (own, its) in enumerate(pairs) if own != its), min(len(encoding.ids), len(other)))
        begin = encoding.offsets[start][0] if start < len(encoding.offsets) else max(0, len(text) - 40)
        shown = slice(start, start + SHOWN_IDS)
        return (
            f"{text[begin : begin + 40]!r} (character {begin}, token {start}) begins with ids {encoding.ids[shown]} by "
            f"{self._path}, and {other[shown]} by transformers ({type(self._tokenizer).__name__})"
        )

    def _warn_of_difference(self, text: str) -> None:
        self._num_compared += 1
        difference = self._difference(text)
        if difference is not None:
            self._num_compared = NUM_COMPARED
            logger.warning(
                "%s: megascore takes the file's. If the model was trained with the others, tokenize the text yourself "
                "(data.tokens); otherwise load the tokenizer in other programs with %s.",
                difference,
                AS_IT_IS,
            )

    def _refuse_difference(self, text: str) -> None:
        difference = self._difference(text)
        if difference is not None:
            raise ModelError(
                f"{difference}: which of them the model knows can't be told. Take tokenizer.json out of the folder if "
                f"it is not the model's; otherwise tokenize the text yourself (data.tokens, data.megatron) with "
                f"{AS_IT_IS}."
            )

    def _check_token(self, token: int, what: str) -> None:
        name, own = self._tokenizer.convert_ids_to_tokens(token), self._file.id_to_token(token)
        if name != own:
            raise ModelError(
                f"transformers ({type(self._tokenizer).__name__}) {what} the token {name!r} with id {token}, which in "
                f"{self._path} is {'no token' if own is None else repr(own)}: the model does not know it. Name the "
                "file's own token in tokenizer_config.json (bos_token, eos_token), or tokenize the text yourself "
                "(data.tokens, data.megatron)."
            )


def ids_of_text(tokenizer: Any, text: str, special: bool) -> list[int]:
    """Return the ids of a text by a tokenizer of transformers."""
    # Quiet, because a text may be longer than the model's context.
    encoding = tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)
    return list(encoding["input_ids"])
