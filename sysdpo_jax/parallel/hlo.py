"""What a compiled program sends between devices, read from its HLO text."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# Bits of an element where the name does not say.
BITS = {"pred": 8, "token": 0}
# A TPU's all-reduce that keeps one part of the sum is a fusion of this name around an all-reduce.
SCATTERED = "all-reduce-scatter"

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)\)(.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=(?:%?([\w.\-]+)|\{([^}]*)\})")
_NAME = re.compile(r"[\w.\-]+")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_INDEX = re.compile(r"index=(\d+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")


class HloError(ValueError):
    """The text is not as expected; a number read from it would be wrong."""


class Instruction(NamedTuple):
    """One line of a computation. operands: names; rest: attributes."""

    root: bool
    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    rest: str


class Collective(NamedTuple):
    """One collective operation and how often a device runs it.

    bytes: of the larger of its operands and results: the array that is gathered, reduced, exchanged or sent.
    """

    kind: str
    bytes: int
    times: int


@dataclass(frozen=True)
class Module:
    """An optimised module: `{computation: {instruction: ...}}`, and which computation is the program."""

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str

    @staticmethod
    def parse(text: str) -> "Module":
        """Raises `HloError` for a text without a program."""
        computations: dict[str, dict[str, Instruction]] = {}
        entry, current = None, {}
        for line in text.splitlines():
            head = _HEAD.match(line)
            if head:
                current = computations.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
            elif found := _INSTRUCTION.match(line.strip()):
                root, name, shape, operation, operands, rest = found.groups()
                names = tuple(re.findall(r"%([\w.\-]+)", operands)) or (operands,)
                current[name] = Instruction(bool(root), name, shape, operation, names, rest)
        if entry is None:
            raise HloError("the HLO text has no ENTRY computation")
        return Module(computations, entry)

    def collectives(self) -> Iterator[Collective]:
        """All that the program leads to, a loop's body as often as it runs.

        The parts of an asynchronous operation, which share a channel, are one. Raises `HloError` for a loop with
        collectives whose trip count cannot be read.
        """
        yield from self._reached(self.entry, 1, set())

    def _reached(self, computation: str, times: int, channels: set[str]) -> Iterator[Collective]:
        """channels: those met in the same round of the same loop."""
        here = self.computations[computation]
        for each in here.values():
            kind = each.operation.removesuffix("-start")
            if kind in KINDS:
                channel = _CHANNEL.search(each.rest)
                if channel is None or channel[1] not in channels:
                    scattered = kind == "all-reduce" and computation.startswith(SCATTERED)
                    yield Collective("reduce-scatter" if scattered else kind, _bytes(each, here), times)
                channels |= {channel[1]} if channel else set()
            inner = [name for groups in _CALLED.findall(each.rest) for group in groups for name in _NAME.findall(group)]
            called = [name for name in inner if name in self.computations]
            if each.operation != "while":
                for name in called:
                    yield from self._reached(name, times, channels)
            elif any(True for name in called for _ in self._reached(name, 1, set())):
                trips = self._trips(each, here)
                for name in called:
                    yield from self._reached(name, times * trips, set())

    def _trips(self, loop: Instruction, around: Mapping[str, Instruction]) -> int:
        """How often a loop runs: as it says, else from a condition `counter < limit` and the counter's first value."""
        known, condition = _TRIPS.search(loop.rest), _CONDITION.search(loop.rest)
        if known:
            return int(known[1])
        if condition:
            inside = self.computations[condition[1]]
            [test] = [each for each in inside.values() if each.root]
            counter, limit = (inside.get(name) for name in (*test.operands, "", "")[:2])
            index = counter and _INDEX.search(counter.rest)
            first = around.get(loop.operands[0])
            if "direction=LT" in test.rest and index and first and first.operation == "tuple":
                start, end = _constant(first.operands[int(index[1])], around), _constant(limit and limit.name, inside)
                if start is not None and end is not None:
                    return max(end - start, 0)
        raise HloError(f"a loop with collectives has no trip count that can be read: {loop.name}, {loop.rest[:200]}")


def _constant(name: str | None, computation: Mapping[str, Instruction]) -> int | None:
    """The value of a whole number that is a constant or a copy of one."""
    each = computation.get(name or "")
    while each and each.operation in ("copy", "bitcast", "convert"):
        each = computation.get(each.operands[0])
    return int(each.operands[0]) if each and each.operation == "constant" else None


def _bytes(each: Instruction, computation: Mapping[str, Instruction]) -> int:
    results = [_array_bytes(*array) for array in _ARRAY.findall(each.shape)]
    given = [computation[name].shape for name in each.operands if name in computation]
    operands = sum(_array_bytes(*array) for shape in given for array in _ARRAY.findall(shape))
    # The result of an asynchronous gather is a tuple of operands, results and counters.
    tuple_of_all = each.operation == "all-gather-start" and each.shape.startswith("(")
    return max(max(results, default=0) if tuple_of_all else sum(results), operands)


def _array_bytes(kind: str, sizes: str) -> int:
    digits = re.match(r"[a-z]+(\d+)", kind)
    bits = BITS[kind] if kind in BITS else int(digits[1]) if digits else 0
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8


def collectives_by_kind(text: str) -> dict[str, dict[str, int]]:
    """`{kind: {"count": runs, "bytes": bytes of all of them}}` of one device in an optimised module's text."""
    totals: dict[str, dict[str, int]] = {}
    for kind, size, times in sorted(Module.parse(text).collectives()):
        total = totals.setdefault(kind, {"count": 0, "bytes": 0})
        total["count"] += times
        total["bytes"] += times * size
    return totals
