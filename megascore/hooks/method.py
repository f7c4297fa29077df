"""Methods: what a hook class says of the score that it computes, and how it is made for a module of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

if TYPE_CHECKING:
    # In typing itself from Python 3.11 on.
    from typing_extensions import Self

__all__ = ["HasMethod", "Method"]


@dataclass(frozen=True)
class Method:
    """What a hook class says of itself when it is defined: the score that it computes."""

    name: str
    """In configs and score files; unique for each of the targets."""
    targets: tuple[str, ...]
    """What it can rank."""
    summary: str
    """The score of one unit, in half a sentence."""
    options: tuple[str, ...]
    """Further keys of an entry of ``scores``."""
    hook: type[HasMethod]
    """The class, in fact one of `ForwardHook`'s."""


class HasMethod:
    """A class that can be asked for by the name of a method and of a target."""

    measures: ClassVar[Method | None] = None
    """The score that the class computes; None for a base of several."""
    needs_job: ClassVar[bool] = False
    """Whether no single module sees what is measured, so that only a job that runs the model itself can measure it."""

    def __init_subclass__(
        cls,
        *,
        method: str | None = None,
        targets: tuple[str, ...] = (),
        summary: str = "",
        options: tuple[str, ...] = (),
        **others: Any,
    ) -> None:
        """Make a class that names a method one of the scores that can be asked for.

        Args:
            method: Name of the score.
            targets: What it can rank; see `megascore.sites.targets`.
            summary: The score of one unit, in half a sentence.
            options: Further keys of an entry of ``scores``, which `check_options` checks and `at` is given.
            others: Of other base classes.
        """
        super().__init_subclass__(**others)
        if method is not None:
            if not targets or not summary:
                raise TypeError(
                    f"{cls.__name__} names its method '{method}', and must say its targets and summary too."
                )
            cls.measures = Method(method, targets, summary, options, cls)
        elif targets or summary or options:
            raise TypeError(f"{cls.__name__} has targets, a summary or options, but names no method.")

    @classmethod
    def at(cls, module: nn.Module, num_units: int, options: Mapping[str, Any]) -> Self:
        """Return a hook for a module of a model; a subclass that needs more than its own calls overrides it.

        Args:
            module: Has the weight of the channels that are scored, where there is one.
            num_units: Channels (heads, experts) of this rank at the place.
            options: Those of an entry of ``scores``, checked.
        """
        return cls()

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Refuse values of the class's own options; those that are not its own never come here.

        Raises:
            ConfigError: naming the option, what came and what was expected.
        """
        return

    @classmethod
    def num_steps(cls, options: Mapping[str, Any]) -> int | None:
        """Return how many steps a run must have; None where any number will do."""
        return None
