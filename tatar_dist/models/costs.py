"""What rows of one prompt cost to compute, in tokens through the language model's matrices."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """Rows of one prompt. rows: their numbers in the batch; prompt: tokens; lengths: tokens of each completion."""

    rows: tuple[int, ...]
    prompt: int
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """In the packed row."""
        return self.prompt + sum(self.lengths)

    @property
    def pairs(self) -> float:
        """Pairs of a query and a key that it sees; a causal square counts half."""
        return self.prompt**2 / 2 + sum(n * (self.prompt + n / 2) for n in self.lengths)

    def parted(self, n: int) -> tuple[Unit, Unit]:
        """The first n rows, and the others."""
        return Unit(self.rows[:n], self.prompt, self.lengths[:n]), Unit(self.rows[n:], self.prompt, self.lengths[n:])


@dataclass(frozen=True)
class RowCosts:
    """What work costs beside a token through the language model's matrices, which costs 1.

    pair: of a query and a key that it sees, in attention; vision, vision_pair: the same in the vision tower, a token
    of the prompt and a pair of them, as if all of a prompt were its image.
    """

    vision: float = 0.4
    pair: float = 3e-5
    vision_pair: float = 3e-5

    def of(self, unit: Unit) -> float:
        """Cost of a packed unit, in tokens."""
        image = self.vision * unit.prompt + self.vision_pair * unit.prompt**2
        return unit.tokens + self.pair * unit.pairs + image
