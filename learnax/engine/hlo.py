"""What a compiled program does, counted from its text: kernels, loops, copies, collectives, operations, bytes.

A compiler has no count of its own for devices that are not here, so its text is read. It is XLA's HLO after all passes
(https://openxla.org/xla/operation_semantics): computations of instructions, of which those of the entry, and of the
loops and calls that it makes, are run one by one.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

_SIZES = {"pred": 1, "token": 0, "opaque": 0, "c64": 8, "c128": 16}
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
_FREE = frozenset(
    (
        *("parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id"),
        *("after-all", "add-dependency", "opt-barrier", "async-update", "domain"),
    )
)
"""Instructions that start nothing on a device themselves."""
_SLICES = ("dynamic-slice", "slice", "gather")

Shape = tuple[str, tuple[int, ...]]
"""An array's type, in XLA's words, and its dimensions."""


@dataclasses.dataclass(frozen=True)
class Counts:
    """What one run of a program does on one device; of a loop whose count is not known, one turn counts.

    Attributes:
        kernels: that are started, copies among them.
        known_loops: loops of a known number of turns.
        unknown_loops: loops whose number of turns is known on the device alone.
        conditionals: branches.
        state_copies: copies of arrays that have the shape of one of the state's.
        collectives: bytes of each kind of collective: what is reduced, gathered or sent.
        pieces: how many there are of each.
        flops: of matrix products and convolutions, by the type that they multiply.
        bytes: that kernels read and write.
        streamed: of those, what is more than a cache of so many bytes can hold of a kernel's.
    """

    kernels: int
    known_loops: int
    unknown_loops: int
    conditionals: int
    state_copies: int
    collectives: Mapping[str, int]
    pieces: Mapping[str, int]
    flops: Mapping[str, float]
    bytes: float
    streamed: float


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    root: bool
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str

    def called(self) -> list[str]:
        """Computations that it names."""
        names = "calls|body|condition|to_apply|true_computation|false_computation"
        found = re.findall(rf"(?:{names})=%?([\w.\-]+)", self.rest)
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
        return found + ([name.strip().lstrip("%") for name in branches[1].split(",")] if branches else [])

    def dimensions(self, name: str) -> list[int]:
        """Numbers of an attribute like `lhs_contracting_dims={1}`."""
        found = re.search(name + r"=\{([0-9,]*)\}", self.rest)
        return [int(number) for number in found[1].split(",") if number] if found else []

    def config(self) -> Any:
        """What the backend noted of it."""
        at = self.rest.find("backend_config=")
        if at < 0:
            return {}
        try:
            return json.JSONDecoder().raw_decode(self.rest, at + len("backend_config="))[0]
        except json.JSONDecodeError:
            return {}


_Computation = dict[str, _Instruction]


def count(text: str, state: Collection[Shape] = (), cache: int = 0) -> Counts:
    """Counts what a compiled program does.

    Args:
        text: of the compiled program.
        state: the shapes of the state's arrays, on one device, copies of which are counted.
        cache: bytes of the device's last cache.
    """
    entry, computations = _parsed(text)
    counter = _Counter(computations, frozenset(state), cache)
    counter.run(entry, 1)
    return Counts(
        counter.kernels,
        counter.known_loops,
        counter.unknown_loops,
        counter.conditionals,
        counter.state_copies,
        dict(counter.collectives),
        dict(counter.pieces),
        dict(counter.flops),
        counter.bytes,
        counter.streamed,
    )


_TYPES = {"bool": "pred", "bfloat16": "bf16", "complex64": "c64", "complex128": "c128"}
_LETTERS = {"float": "f", "int": "s", "uint": "u"}


def shape_of(array: Any) -> Shape:
    """An array's shape in XLA's words."""
    name = array.dtype.name
    letters = name.rstrip("0123456789")
    return _TYPES.get(name) or _LETTERS.get(letters, letters) + name[len(letters) :], tuple(array.shape)


class _Counter:
    """Walks through what is run, from the entry on."""

    def __init__(self, computations: Mapping[str, _Computation], state: frozenset[Shape], cache: int):
        self._computations = computations
        self._state = state
        self._cache = cache
        self.kernels = self.known_loops = self.unknown_loops = self.conditionals = self.state_copies = 0
        self.collectives: collections.Counter[str] = collections.Counter()
        self.pieces: collections.Counter[str] = collections.Counter()
        self.flops: dict[str, float] = collections.defaultdict(float)
        self.bytes = self.streamed = 0.0

    def run(self, name: str, times: int) -> None:
        """A computation whose instructions are started one by one, so many times."""
        own = self._computations[name]
        for instruction in own.values():
            if instruction.opcode == "while":
                self._loop(instruction, times)
            elif instruction.opcode == "conditional":
                self.conditionals += 1
                for branch in instruction.called():
                    self.run(branch, times)
            elif instruction.opcode == "call":
                for called in instruction.called():
                    self.run(called, times)
            elif (kind := self._collective(instruction)) is not None:
                self.collectives[kind] += times * _moved(kind, own, instruction)
                self.pieces[kind] += times
                self.kernels += times
            elif instruction.opcode not in _FREE and not instruction.opcode.endswith("-done"):
                self._kernel(own, instruction, times)

    def _loop(self, instruction: _Instruction, times: int) -> None:
        trips = instruction.config().get("known_trip_count", {}).get("n")
        if trips is None:
            self.unknown_loops += 1
        else:
            self.known_loops += 1
        for called in instruction.called():
            self.run(called, times * int(trips or 1))

    def _collective(self, instruction: _Instruction) -> str | None:
        """Which collective it starts, by itself or as what is started asynchronously."""
        opcodes = [instruction.opcode]
        if instruction.opcode == "async-start":
            opcodes = [inner.opcode for name in instruction.called() for inner in self._computations[name].values()]
        for opcode in opcodes:
            if opcode.removesuffix("-start") in _COLLECTIVES:
                return opcode.removesuffix("-start")
        return None

    def _kernel(self, own: _Computation, instruction: _Instruction, times: int) -> None:
        self.kernels += times
        if self._copies(instruction) and any(shape in self._state for shape in instruction.shapes):
            self.state_copies += times
        traffic = self._traffic(own, instruction)
        self.bytes += times * traffic
        # What a kernel finds in the cache, and what it leaves there to be written later, are as much as that at most.
        self.streamed += times * max(traffic - 2 * self._cache, 0)
        self._operations(own, instruction, times)

    def _copies(self, instruction: _Instruction) -> bool:
        if instruction.opcode in ("copy", "copy-start"):
            return True
        if instruction.opcode != "fusion":
            return False
        inner = {one.opcode for name in instruction.called() for one in self._computations[name].values()}
        return "copy" in inner and inner <= {"copy", "parameter", "bitcast", "tuple"}

    def _traffic(self, own: _Computation, instruction: _Instruction) -> float:
        """Bytes that a kernel reads and writes; of an array that it takes a slice of, the slice."""
        written = sum(map(_bytes, instruction.shapes))
        if instruction.opcode == "fusion":
            (name,) = instruction.called()
            return _fused(self._computations[name], written)
        if instruction.opcode in _SLICES:
            return 2 * written
        given = [sum(map(_bytes, own[name].shapes)) for name in instruction.operands if name in own]
        return 2 * given[1] if instruction.opcode == "dynamic-update-slice" else sum(given) + written

    def _operations(self, own: _Computation, instruction: _Instruction, times: int) -> None:
        if instruction.opcode == "dot":
            left = own[instruction.operands[0]].shapes[0]
            contracted = math.prod(left[1][axis] for axis in instruction.dimensions("lhs_contracting_dims"))
            self.flops[left[0]] += times * 2 * math.prod(instruction.shapes[0][1]) * contracted
        elif instruction.opcode == "custom-call" and instruction.operands:
            left = own[instruction.operands[0]].shapes[0]
            self.flops[left[0]] += times * _of_library(own, instruction)
        elif instruction.opcode == "convolution":
            left = own[instruction.operands[0]].shapes[0]
            outputs = math.prod(instruction.shapes[0][1])
            self.flops[left[0]] += times * 2 * outputs * _per_output(own, instruction)
        elif instruction.opcode in ("fusion", "async-start"):
            for name in instruction.called():
                inner = self._computations[name]
                for one in inner.values():
                    self._operations(inner, one, times)


def _of_library(own: _Computation, call: _Instruction) -> float:
    """Operations of a matrix product or convolution that a library makes; 0 of any other call."""
    config = call.config()
    numbers = config.get("gemm_backend_config", {}).get("dot_dimension_numbers")
    if numbers:
        left = own[call.operands[0]].shapes[0]
        axes = numbers.get("lhs_contracting_dimensions", [])
        return 2.0 * math.prod(call.shapes[0][1]) * math.prod(left[1][int(axis)] for axis in axes)
    if "__cudnn$conv" not in call.rest:
        return 0.0
    # The sizes of the forward convolution: of whichever of its three arrays this call makes the third.
    if "BackwardInput" in call.rest:
        outputs = math.prod(own[call.operands[0]].shapes[0][1])
    elif "BackwardFilter" in call.rest:
        outputs = math.prod(own[call.operands[1]].shapes[0][1])
        return 2.0 * outputs * _window(call.shapes[0], call)
    else:
        outputs = math.prod(call.shapes[0][1])
    return 2.0 * outputs * _per_output(own, call)


def _per_output(own: _Computation, convolution: _Instruction) -> float:
    """Products that an output of a convolution is the sum of."""
    return _window(own[convolution.operands[1]].shapes[0], convolution)


def _window(kernel: Shape, convolution: _Instruction) -> float:
    found = re.search(r"dim_labels=\w+_(\w+)->", convolution.rest)
    if found is None:
        return 0.0
    return float(math.prod(size for size, label in zip(kernel[1], found[1], strict=True) if label != "o"))


def _fused(inner: _Computation, written: int) -> float:
    """What a fusion reads and writes, by what is done with its parameters."""
    users: dict[str, list[tuple[_Instruction, int]]] = collections.defaultdict(list)
    for one in inner.values():
        for place, name in enumerate(one.operands):
            users[name].append((one, place))
    read = 0.0
    for one in inner.values():
        if one.opcode != "parameter":
            continue
        size = sum(map(_bytes, one.shapes))
        uses = _uses(one.name, users)
        if uses and all(place == 0 and use.opcode in (*_SLICES, "dynamic-update-slice") for use, place in uses):
            # Of what is updated in place nothing is read.
            size = min(size, sum(_bytes(use.shapes[0]) for use, _ in uses if use.opcode in _SLICES))
        read += size
    saved = sum(
        _bytes(one.shapes[0]) - _bytes(inner[one.operands[1]].shapes[0])
        for one in inner.values()
        if one.opcode == "dynamic-update-slice" and one.operands[1] in inner and _is_result(one, users)
    )
    return read + max(written - saved, 0)


def _uses(name: str, users: Mapping[str, list[tuple[_Instruction, int]]]) -> list[tuple[_Instruction, int]]:
    """What is done with a value, seen through renamings."""
    found = []
    for use, place in users[name]:
        found += _uses(use.name, users) if use.opcode == "bitcast" else [(use, place)]
    return found


def _is_result(one: _Instruction, users: Mapping[str, list[tuple[_Instruction, int]]]) -> bool:
    return one.root or all(use.opcode == "tuple" for use, _ in _uses(one.name, users))


def _moved(kind: str, own: _Computation, instruction: _Instruction) -> int:
    """Bytes of a collective's data: the whole of what is gathered, reduced or sent."""
    results = [_bytes(shape) for shape in instruction.shapes]
    given = [sum(map(_bytes, own[name].shapes)) for name in instruction.operands if name in own]
    if kind == "reduce-scatter":
        return sum(given)
    # What is only started gives what it was given beside its results.
    return sum(results) - sum(given) if instruction.opcode.endswith("-start") and kind != "all-reduce" else sum(results)


def _bytes(shape: Shape) -> int:
    kind, dimensions = shape
    bits = re.search(r"\d+", kind)
    size = _SIZES.get(kind) or (int(bits[0]) / 8 if bits and kind not in _SIZES else 0)
    return math.ceil(math.prod(dimensions) * size)


def _parsed(text: str) -> tuple[str, dict[str, _Computation]]:
    """The entry's name, and all computations by theirs."""
    entry, computations = "", dict[str, _Computation]()
    own: _Computation = {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            own = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif begin := _INSTRUCTION.match(line):
            instruction = _instruction(begin, re.sub(r"/\*.*?\*/", "", line[begin.end() :]))
            own[instruction.name] = instruction
    if not entry:
        raise ValueError("this is no text of a compiled program: it has no ENTRY")
    return entry, computations


def _instruction(begin: re.Match[str], line: str) -> _Instruction:
    end = _closing(line, 0) + 1 if line.startswith("(") else line.index(" ")
    shapes = tuple(_shapes(line[:end]))
    opcode, _, rest = line[end:].strip().partition("(")
    close = _closing("(" + rest, 0) - 1
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[:close]))
    return _Instruction(begin[2], bool(begin[1]), shapes, opcode.strip(), operands, rest[close:])


def _shapes(text: str) -> Iterator[Shape]:
    for kind, sizes in _ARRAY.findall(text):
        yield kind, tuple(int(size) for size in sizes.split(",") if size)


def _closing(text: str, at: int) -> int:
    """Where the parenthesis that opens at a place closes."""
    depth = 0
    for place in range(at, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    return len(text)
