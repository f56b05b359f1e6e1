"""Recurring checks on a budget: all of them together use at most a share of one CPU, however many networks there are.

The intervals of all kinds of checks are stretched by the same factor when the budget does not suffice. The networks
share a kind evenly: each is checked in turn. docs/operators/limits.md has what follows for the time until a fault is
noticed.
"""

from __future__ import annotations

SHARE = 0.010  # of one CPU, for all recurring checks of the agent
_AVERAGED = 16  # checks, for the mean cost of one


class Budget:
    """Used on the event loop. ``share``: of one CPU."""

    def __init__(self, share: float = SHARE) -> None:
        self._share = share
        self._all: list[Checks] = []

    def checks(self, every_s: float, cpu_s: float) -> Checks:
        """A kind of checks: each object is due once in ``every_s``. ``cpu_s``: a first guess of what a check costs."""
        made = Checks(self, every_s, cpu_s)
        self._all.append(made)
        return made

    @property
    def factor(self) -> float:
        """By how much the intervals are stretched: 1.0 while the budget suffices."""
        return max(1.0, sum(it.demand for it in self._all) / self._share)


class Checks:
    """One kind of checks, made by ``Budget.checks``. ``every_s``: between two checks of an object, unless stretched."""

    def __init__(self, budget: Budget, every_s: float, cpu_s: float) -> None:
        self._budget = budget
        self.every_s = every_s
        self._cpu_s = cpu_s
        self._number = 0
        self._measured = 0

    @property
    def demand(self) -> float:
        """The share of one CPU that the checks would use if nothing were stretched."""
        return self._number * self._cpu_s / self.every_s

    def used(self, cpu_s: float) -> None:
        """A check has used so much CPU time. The mean of the last checks counts. Any thread, one at a time."""
        self._measured += 1
        self._cpu_s += (cpu_s - self._cpu_s) / min(self._measured, _AVERAGED)

    def turn_s(self, number: int) -> float:
        """The time in which each of ``number`` objects is checked once."""
        self._number = number
        return self.every_s * self._budget.factor  # guard: checks-keep-to-their-budget

    def pause_s(self, number: int) -> float:
        """The time until the next check, if ``number`` objects share the checks. At least one object."""
        return self.turn_s(number) / number
