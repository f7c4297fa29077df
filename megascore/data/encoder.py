"""Text to token ids, with the tokenizer of a Hugging Face folder."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megascore.data.source import TokenIds, ids_of_list
from megascore.data.tokenizer_file import FileTokenizer, ids_of_text
from megascore.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoder"]

logger = logging.getLogger(__name__)

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


class Encoder:
    """Tokenizes documents; the tokenizer is loaded with the first one that needs it."""

    def __init__(self, folder: str | Path | None, packing: bool) -> None:
        """Keep what is needed.

        Args:
            folder: Hugging Face folder with tokenizer files; nothing is downloaded. None where there is none.
            packing: Whether documents are joined. They then get no special tokens, but for an end-of-text token behind
                each, if the tokenizer has one. Otherwise they get those that the tokenizer itself puts around a text.
        """
        self._folder = None if folder is None else Path(folder)
        self._packing = packing
        self._num_with_tokens = 0
        self._first_without: str | None = None

    def running_text(self, text: str) -> TokenIds:
        """Return the tokens of a text, without special tokens.

        Raises:
            ModelError: transformers is not installed, or the folder has no tokenizer that it can load, or whose special
                tokens are not those of its tokenizer.json; or the tokenizer makes no tokens of a text.
            ConfigError: no folder was given.
        """
        ids = self._ids(text, special=False)
        self._count(text, ids, "the text")
        self.check_made_tokens()
        return ids

    def document(self, value: Any, where: str) -> TokenIds:
        """Return the tokens of a document: a text, or token ids already, which stay as they are; none of a blank text.

        Args:
            value: What a file holds in its place.
            where: File, line and field, for errors.

        Raises:
            DataError: it is neither.
            ModelError: see `running_text`.
            ConfigError: see `running_text`.
        """
        if isinstance(value, list):
            return ids_of_list(value, where)
        if not isinstance(value, str):
            kind = "null" if value is None else type(value).__name__
            raise DataError(f"{where} is {kind}: expected a text, or a list of token ids.")
        _check_characters(value, where)
        if not value.strip():
            # Special tokens alone are no document.
            return np.empty(0, dtype=np.int64)
        ids = self._ids(value, special=False)
        self._count(value, ids, where)
        if not self._packing:
            return self._ids(value, special=True) if len(ids) else ids
        return ids if self._end is None else np.append(ids, self._end)

    def check_made_tokens(self) -> None:
        """Check that the tokenizer has made tokens of at least one of the texts so far, if there were any.

        Raises:
            ModelError: it has not, so that more or other data would not help.
        """
        if self._first_without is not None and not self._num_with_tokens:
            raise ModelError(
                f"the tokenizer in {self._folder} makes no tokens of any text, such as {self._first_without}: its "
                "vocabulary does not have these characters, or not the way its tokenizer.json splits them. The data is "
                "not at fault: take good copies of the model's tokenizer files, or name another folder in "
                "data.tokenizer."
            )

    def _count(self, text: str, ids: TokenIds, where: str) -> None:
        """Note whether a text became tokens."""
        if len(ids):
            self._num_with_tokens += 1
        elif text.strip() and self._first_without is None:
            self._first_without = f"{text.strip()[:40]!r} ({where})"
            logger.warning("the tokenizer in %s makes no tokens of %s", self._folder, self._first_without)

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self._folder is None:
            raise ConfigError(
                "data.tokenizer is not given, and there is no model.hf to take a tokenizer from: name a Hugging Face "
                "directory with tokenizer files."
            )
        return _load_tokenizer(self._folder)

    @cached_property
    def _file(self) -> FileTokenizer | None:
        """The tokenizer as tokenizer.json has it; None where there is no such file."""
        tokenizer = self._tokenizer
        assert self._folder is not None
        path = self._folder / "tokenizer.json"
        return FileTokenizer(path, tokenizer) if path.is_file() else None

    @cached_property
    def _end(self) -> int | None:
        """The token between documents."""
        end = self._tokenizer.eos_token_id if self._file is None else self._file.end()
        if end is None:
            logger.info("the tokenizer in %s has no end-of-text token: documents follow each other", self._folder)
        return end

    def _ids(self, text: str, special: bool) -> TokenIds:
        if self._file is not None:
            return np.array(self._file.ids(text, special), dtype=np.int64)
        return np.array(ids_of_text(self._tokenizer, text, special), dtype=np.int64)


def _check_characters(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds half a character at position {error.start} ({text[error.start]!r}, a lone surrogate): "
            "expected text that UTF-8 can hold. Write the character whole, or drop it."
        ) from error


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not folder.is_dir():
        raise ModelError(
            f"tokenizer folder {folder} not found: data.tokenizer, or model.hf where that is not given, names a "
            "Hugging Face directory."
        )
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise ModelError(
            f"folder {folder} has no tokenizer, none of {', '.join(VOCABULARY_FILES)}: "
            f"copy the tokenizer files of the model into it, or name another folder in data.tokenizer."
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ModelError(
            f"the tokenizer in {folder} needs transformers ({error}): run pip install 'megascore[huggingface]'."
        ) from error
    try:
        # Not given, transformers asks on the terminal of one rank, while the others wait.
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # The Rust tokenizers raise bare Exception for a damaged file.
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"the tokenizer in {folder} is code of its own (auto_map in tokenizer_config.json), which megascore "
                "does not run: name a folder with a tokenizer that transformers has (data.tokenizer), or tokenize the "
                "text yourself (data.tokens, data.megatron)."
            ) from error
        raise ModelError(f"the tokenizer in {folder} cannot be loaded: {type(error).__name__}: {error}") from error
