"""What every operation says of itself: what it takes, how it is drawn, and what becomes of channels that are gone.

The oracle compares a smaller network with the original with masked weights: every removed slice of every parameter
is zero. They need not compute the same. A value is *silent* when its removed entries are then exactly zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import nn

from random_nets.program import Choose, Settings
from random_nets.shapes import IMAGE, SEQUENCE, VECTOR, Shape

OverSpace = Literal["keeps", "closes", "opens", "mixes"]


class Op(nn.Module):
    """An operation on values.

    Attributes:
        arity: The number of its operands; -1: two or more.
        takes: The kinds of values that it can be applied to.
        exact: False: it counts the channels that are left, so masked weights compute something else.
        needs_silence: True: what is removed must be zero, or it is counted in.
        makes_silence: True: its own weights make what is removed zero.
        breaks_silence: True: f(0) is not 0.
        space: What it does where space itself can shrink: keeps it so, closes, opens, mixes it.
    """

    arity: ClassVar[int] = 1
    takes: ClassVar[frozenset[int]] = VECTOR | SEQUENCE | IMAGE
    exact: ClassVar[bool] = True
    needs_silence: ClassVar[bool] = False
    makes_silence: ClassVar[bool] = False
    breaks_silence: ClassVar[bool] = False
    space: ClassVar[OverSpace] = "mixes"

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        """Whether it can be applied to values of these shapes."""
        return all(len(shape) in cls.takes for shape in shapes)

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        """Its constructor arguments."""
        return {}

    @classmethod
    def silent(cls, flags: Sequence[bool], settings: Settings) -> bool:
        """Whether its output is silent, by whether each operand is."""
        return cls.makes_silence or (all(flags) and not cls.breaks_silence)

    @classmethod
    def valid(cls, flags: Sequence[bool], settings: Settings) -> bool:
        """Whether masked weights still compute the same as the smaller network."""
        return cls.exact and (all(flags) or not cls.needs_silence)

    @classmethod
    def over_space(cls, settings: Settings) -> OverSpace:
        """What it does to space (or positions) that can shrink; mixing it counts what is left."""
        return cls.space


class Variant(Op):
    """An operation of one setting: in which of several ways it is done.

    Attributes:
        hows: The ways.
    """

    hows: ClassVar[tuple[str, ...]]

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        """One of its ways."""
        return {"how": choose(cls.hows)}
