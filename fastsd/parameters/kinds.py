"""What a row of `fastsd.parameters` is: a parameter, and the kind of values that it takes."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastsd.errors import FastsdError, about

RANDOM_SEED = -1
MAX_SEED = 2**64 - 1  # as ComfyUI has it, and as PyTorch and Philox take it
MAX_IMAGES = 1000
MAX_STEPS = 1000
MAX_SIDE = 8192
# The headings of --help.
WHAT, HOW = "what to generate", "how to generate it (defaults: the model's own)"
CONTROL = "control (flags may be given again, for the next --control)"
START, WHERE = "starting from an image", "where"


@dataclass(frozen=True)
class Kind:
    """What values a parameter takes. `stored` is their type in an image's metadata; None: it is not kept there."""

    metavar: str = "TEXT"
    stored: type | tuple[type, ...] | None = str

    def read(self, text: str) -> Any:
        """The value that a text stands for, whatever its range; a ValueError where it stands for none."""
        return text

    def parse(self, text: str) -> Any:
        """The value that a text stands for; raises as `check`."""
        return self.check(text)

    def check(self, value: Any) -> Any:
        """`value` in its usual form.

        Raises:
            FastsdError: it is none of these; the caller adds the argument.
        """
        return value

    def recorded(self, value: Any) -> Any:
        """The value as metadata keeps it."""
        return value

    def __str__(self) -> str:
        return ""


@dataclass(frozen=True)
class Number(Kind):
    """A finite number from `low` to `high`."""

    low: float = 0.0
    high: float = math.inf
    metavar: str = "X"
    stored: type | tuple[type, ...] | None = (int, float)

    def read(self, text: str) -> Any:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text} is not finite")
        return value

    def parse(self, text: str) -> Any:
        try:
            return self.check(self.read(text))
        except ValueError:
            raise FastsdError(f"it should be {self}", value=text) from None

    def check(self, value: Any) -> Any:
        if not self._fits(value) or not math.isfinite(value) or not self.low <= value <= self.high:
            raise FastsdError(f"it should be {self}", value=value)
        return self._convert(value)

    def _fits(self, value: Any) -> bool:
        return isinstance(value, numbers.Real) and not isinstance(value, bool)

    def _convert(self, value: Any) -> Any:
        return float(value)

    def __str__(self) -> str:
        return f"a number from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class NumberEach(Number):
    """A number; from Python also a list, an array or a 1-d tensor of them, one for each prompt or each image."""

    def check(self, value: Any) -> Any:
        several = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(several, list | tuple) and several:
            return [Number.check(self, one) for one in several]
        return Number.check(self, several)


@dataclass(frozen=True)
class Whole(Number):
    """A whole number from `low` to `high`."""

    low: int = 0
    high: int = MAX_SEED
    metavar: str = "N"
    stored: type | tuple[type, ...] | None = int

    def read(self, text: str) -> int:
        return int(text)

    def _fits(self, value: Any) -> bool:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)

    def _convert(self, value: Any) -> int:
        return int(value)

    def __str__(self) -> str:
        return f"a whole number from {self.low} to {self.high}"


SHARE = Number(low=0, high=1)


@dataclass(frozen=True)
class Text(Kind):
    """One text, or a list of them where the call takes several."""


@dataclass(frozen=True)
class Name(Kind):
    """A name out of a table, which the table's own function resolves; or one that a regular expression describes."""

    metavar: str = "NAME"
    pattern: str = ""
    expected: str = ""
    names: Mapping[str, Any] = field(default_factory=dict)

    def check(self, value: Any) -> str:
        if not isinstance(value, str) or (self.pattern and not re.fullmatch(self.pattern, value)):
            raise FastsdError(f"it should be {self.expected or 'a name'}", value=value)
        return value


@dataclass(frozen=True)
class Choice(Kind):
    """One of a few words."""

    metavar: str = "NAME"
    options: tuple[str, ...] = ()

    def read(self, text: str) -> str:
        return self.check(text)

    def check(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.options:
            raise FastsdError(f"it should be {self}", value=value)
        return value

    def __str__(self) -> str:
        return f"one of {', '.join(self.options)}"


@dataclass(frozen=True)
class Enlarger(Choice):
    """One of a few words, or a `fastsd.Upscaler`, whose file stands for it on the command line."""

    metavar: str = "NAME"

    def read(self, text: str) -> str:
        return text

    def parse(self, text: str) -> Any:
        return text

    def check(self, value: Any) -> Any:
        return value if hasattr(value, "result_size") else super().check(value)

    def recorded(self, value: Any) -> Any:
        return value if value is None or isinstance(value, str) else value.name

    def __str__(self) -> str:
        return f"{super().__str__()}, or a fastsd.Upscaler"


@dataclass(frozen=True)
class Switch(Kind):
    """On or off. `value` is what its flag stands for."""

    stored: type | tuple[type, ...] | None = bool
    value: Any = True

    def check(self, value: Any) -> bool:
        of_numpy = type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")
        if not isinstance(value, bool) and not of_numpy:  # a text "False" would count as true
            raise FastsdError("it should be True or False", value=value)
        return bool(value)


@dataclass(frozen=True)
class Constant(Choice):
    """One of a few words, of which the flag stands for one."""

    value: Any = None


@dataclass(frozen=True)
class File(Kind):
    """A path, or a hub id where a model is meant."""

    metavar: str = "FILE"
    stored: type | tuple[type, ...] | None = None


@dataclass(frozen=True)
class Value(Kind):
    """A Python object, which the code that takes it checks."""

    stored: type | tuple[type, ...] | None = None


@dataclass(frozen=True)
class Sides(Kind):
    """Pixels at the left, top, right and bottom, as a text "64,0,64,0"; a sequence of four is brought to it."""

    metavar: str = "L,T,R,B"

    def check(self, value: Any) -> str:
        parts = value.split(",") if isinstance(value, str) else value
        try:
            pixels = [int(str(part).strip()) for part in parts]
        except (TypeError, ValueError):
            pixels = []
        if len(pixels) != 4 or min(pixels) < 0 or not 0 < max(pixels) <= MAX_SIDE:
            raise FastsdError(f"it should be {self}", value=value)
        return ",".join(map(str, pixels))

    def __str__(self) -> str:
        return f"four whole numbers of pixels up to {MAX_SIDE}: left,top,right,bottom"


@dataclass(frozen=True)
class Descending(Kind):
    """Numbers that fall from one to the next, as a text "999,750,0"; a sequence, array or tensor is brought to it.

    Attributes:
        whole: they are whole numbers.
        least: how many there are at least.
        high: the first is at most this.
    """

    metavar: str = "A,B,..."
    whole: bool = False
    least: int = 1
    high: float = math.inf

    def check(self, value: Any) -> str:
        several = value.tolist() if hasattr(value, "tolist") else value
        try:
            parts = [str(part).strip() for part in (several.split(",") if isinstance(several, str) else several)]
            found = [float(part) for part in parts]
        except (TypeError, ValueError):
            found = []
        falls = all(0 <= after < before < math.inf for before, after in zip(found, found[1:]))
        fits = self.least <= len(found) <= MAX_STEPS + 1 and 0 <= found[0] <= self.high and falls
        if not fits or (self.whole and any(number % 1 for number in found)):
            raise FastsdError(f"it should be {self}", value=value)
        return ",".join(f"{int(number)}" if number % 1 == 0 else repr(number) for number in found)

    def __str__(self) -> str:
        numbers = f"{'whole ' * self.whole}numbers, each below the one before"
        return (
            f"{numbers}: 999,750,0" if self.whole else f"at least {self.least} {numbers}, the last 0 or above: 14,2,0"
        )


@dataclass(frozen=True)
class Numbers(Kind):
    """`count` numbers from `low` to `high`, as a text "1.5,1.6"; a sequence is brought to it."""

    count: int = 2
    low: float = 0.0
    high: float = math.inf

    def check(self, value: Any) -> str:
        try:
            found = [float(part) for part in (value.split(",") if isinstance(value, str) else value)]
        except (TypeError, ValueError):
            found = []
        if len(found) != self.count or not all(self.low <= number <= self.high for number in found):
            raise FastsdError(f"it should be {self}", value=value)
        return ",".join(map(repr, found))

    def __str__(self) -> str:
        return f"{self.count} numbers from {self.low:g} to {self.high:g}: {self.metavar}"


@dataclass(frozen=True)
class Pair(Kind):
    """Two whole numbers, (height, width) or (top, left), in diffusers' order."""

    stored: type | tuple[type, ...] | None = None

    def check(self, value: Any) -> tuple[int, int]:
        pair = isinstance(value, tuple | list) and len(value) == 2
        if not pair or not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**20 for n in value):
            raise FastsdError("it should be two whole numbers, (height, width) or (top, left)", value=value)
        return value[0], value[1]


@dataclass(frozen=True)
class Function(Kind):
    """A callable."""

    stored: type | tuple[type, ...] | None = None

    def check(self, value: Any) -> Any:
        if not callable(value):
            raise FastsdError("it should be a function", value=value)
        return value


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        name: the argument in Python, and the key in an image's metadata.
        kind: the values that it takes.
        help: one line, for the command line and the reference. `{name}` in it stands for another parameter. Empty: the
            names of the kind.
        default: where none is given; None: the checkpoint's own, or none.
        flags: on the command line, the main one first; none: Python alone takes it.
        group: its heading in --help.
        of: "call", an argument of `Pipeline.__call__`; "load", of `Pipeline.from_pretrained`; "cli", of neither.
        needs: the parameter without which it has no effect, and what that one does.
        excludes: the parameter that it cannot be combined with, and why.
        label: its key in A1111's text, where one value stands for one parameter.
        metadata_key: its key in the metadata, where that is not its name.
        repeat: `--from-image` gives it the value in the image's metadata, where that is one value.
        few_step: its default belongs to the kind of few-step model.
        several: the flag may be given again.
        counts_as: the parameter that it stands for where others need that one.
        rare: --help leaves it out; --help-all does not.
    """

    name: str
    kind: Kind
    help: str
    flags: tuple[str, ...] = ()
    group: str = ""
    default: Any = None
    of: str = "call"
    needs: tuple[str, str] | None = None
    excludes: tuple[str, str] | None = None
    label: str = ""
    metadata_key: str = ""
    repeat: bool = True
    few_step: bool = False
    several: bool = False
    counts_as: str = ""
    rare: bool = False

    @property
    def flag(self) -> str:
        """The flag that messages use, or the name where there is none."""
        return next((flag for flag in self.flags if flag.startswith("--")), self.name)

    @property
    def key(self) -> str:
        """The key in the metadata."""
        return self.metadata_key or self.name

    @property
    def text(self) -> str:
        """The help."""
        return self.help or " ".join(getattr(self.kind, "names", ()))

    @property
    def is_repeated(self) -> bool:
        return self.repeat and self.kind.stored not in (None, dict, list)

    def parse(self, text: str) -> Any:
        """`Kind.parse`, with errors about this parameter."""
        with about(self.name):
            return self.kind.parse(text)

    def check(self, value: Any) -> Any:
        """`Kind.check`, with errors about this parameter."""
        with about(self.name):
            return self.kind.check(value)
