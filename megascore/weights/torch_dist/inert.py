"""Stand-ins for the classes that a pickle names, so that reading it runs no code that the file asks for."""

from __future__ import annotations

from typing import Any

__all__ = ["InertRecord", "inert_class"]


class InertRecord:
    """The arguments and the state of a pickled object; its class is known by name only."""

    pickled_name = ""
    """Module and name of the class that the file names."""

    def __init__(self, *args: Any) -> None:
        """Keep the arguments that the object was made with."""
        self.args = args
        self.state: Any = None

    def __new__(cls, *_args: Any) -> InertRecord:
        """Take any arguments; unpickling does not always call ``__init__`` afterwards."""
        record = super().__new__(cls)
        record.args = ()
        record.state = None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, field: str, default: Any = None) -> Any:
        """Return a field of an object that has its fields by name."""
        return self.state.get(field, default) if isinstance(self.state, dict) else default

    def __repr__(self) -> str:
        return f"<{self.pickled_name}>"


def inert_class(pickled_name: str) -> type[InertRecord]:
    """Return a new stand-in for a class or function, so that whatever a file does to it touches nothing else.

    Args:
        pickled_name: Module and name, with a dot between them.
    """
    return type("InertRecord", (InertRecord,), {"pickled_name": pickled_name})
