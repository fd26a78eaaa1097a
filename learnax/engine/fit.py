"""Whether a run fits devices that are not here, and what it would do there: found out by compiling for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from learnax.engine import hlo
from learnax.engine.engine import Wanted
from learnax.engine.plan import Plan
from learnax.engine.targets import Card, Remote, Target
from learnax.profiling.costs import amount
from learnax.utils import PyTree, key_data

_FEW = 16
"""Numbers of an array whose copies are not counted."""
_TAKEN = 0.75
"""The part of a GPU's memory that JAX takes by default."""


@dataclasses.dataclass(frozen=True)
class Compiled(hlo.Counts):
    """A program as it would run, on each device: what it does, and what it takes.

    Attributes:
        state_bytes: of the training state, or of what of it is evaluated.
        donated_bytes: of arguments that are updated in place.
        temporary_bytes: of scratch.
        total_bytes: arguments, results and scratch.
        bound_s: seconds below which a call cannot stay: of its products at the card's peak, or of the bytes that no
            cache of that size can hold at the memory's rate, whichever are more. A bound, not a forecast.
    """

    state_bytes: int
    donated_bytes: int
    temporary_bytes: int
    total_bytes: int
    bound_s: float

    def rows(self) -> list[tuple[str, str]]:
        """Lines of a table."""
        moved = [
            f"{kind} {amount(size, 'B')} in {self.pieces[kind]}" for kind, size in sorted(self.collectives.items())
        ]
        return [
            (
                "memory",
                f"{amount(self.total_bytes, 'B')}: state {amount(self.state_bytes, 'B')}, temporary "
                f"{amount(self.temporary_bytes, 'B')}; {amount(self.donated_bytes, 'B')} updated in place",
            ),
            (
                "kernels",
                f"{self.kernels}; loops: {self.known_loops} of known length, {self.unknown_loops} of unknown; "
                f"{self.conditionals} branches; {self.state_copies} copies of the state's arrays",
            ),
            *([("collectives", ", ".join(moved))] if moved else []),
            (
                "work",
                f"{amount(sum(self.flops.values()), 'FLOP')} in products, {amount(self.bytes, 'B')} read and "
                f"written; not below {amount(self.bound_s, 's')} (a bound, not a forecast)",
            ),
        ]


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a run would take on devices that are not here. Printed, it is a table.

    Attributes:
        target: the devices.
        programs: by kind, "train" for one.
        data_bytes: of data that stay on each device, beside what a program is given.
        plan: steps in a dispatch, and why.
        remedy: what would make a run fit that does not; None where nothing that was tried does, or nothing has to.
    """

    target: Target
    programs: Mapping[str, Compiled]
    data_bytes: int
    plan: Plan
    remedy: str | None = None

    @property
    def memory(self) -> int:
        """Bytes that are taken on each device."""
        return max(program.total_bytes for program in self.programs.values()) + self.data_bytes

    @property
    def capacity(self) -> int:
        """Bytes that each device has."""
        return self.target.card.memory

    @property
    def fits(self) -> bool:
        """Whether each device has the memory."""
        return self.memory <= self.capacity

    def __str__(self) -> str:
        card = self.target.card
        rows = [("target", f"{self.target.count} x {card.kind}, compiled for; nothing was run")]
        rows += [("plan", str(self.plan))]
        for kind, program in self.programs.items():
            rows += [(f"{kind}: {name}", text) for name, text in program.rows()]
        if self.data_bytes:
            rows.append(("data", f"{amount(self.data_bytes, 'B')} stay on each device"))
        rows.append(("fits", self._verdict()))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)

    def _verdict(self) -> str:
        text = f"{amount(self.memory, 'B')} of the {amount(self.capacity, 'B')} on each device"
        if not self.fits:
            over = amount(self.memory - self.capacity, "B")
            return f"no: {text}, {over} too much; {self.remedy or 'none of remat, accumulate_steps, shard_state does'}"
        if self.memory > _TAKEN * self.capacity:
            return f"yes: {text}; JAX takes {_TAKEN:.0%} by default: set XLA_PYTHON_CLIENT_MEM_FRACTION=.95"
        return f"yes: {text}"


def compiled_for(engine: Remote, wanted: Iterable[Wanted], card: Card) -> dict[str, Compiled]:
    """Compiles programs for devices that are not here.

    Args:
        engine: of the devices.
        wanted: the programs; the first argument of each is a state.
        card: the devices' kind.

    Returns:
        By kind; of several programs of one kind, the one that takes most memory.
    """
    wanted = list(wanted)
    engine.prepare(wanted)
    found: dict[str, Compiled] = {}
    for kind, signature, args in wanted:
        compiled = engine.programs[kind.name, signature].compiled
        program = looked_at(compiled, _own_arrays(args[0], engine.shardings(kind.inputs[0])), card)
        if kind.name not in found or found[kind.name].total_bytes < program.total_bytes:
            found[kind.name] = program
    return found


def looked_at(compiled: jax.stages.Compiled, state: Sequence[Any], card: Card) -> Compiled:
    """A program that was compiled for a card.

    Args:
        compiled: it.
        state: the arrays that a device has of the state, or their shapes.
        card: what it is compiled for.
    """
    memory: Any = compiled.memory_analysis()
    # A copy of a few numbers, a count or a bias of three, is none of the state: what counts is memory.
    shapes = {hlo.shape_of(leaf) for leaf in state if leaf.size > _FEW}
    counts = hlo.count(compiled.as_text() or "", shapes, card.cache)
    ends = memory.argument_size_in_bytes + memory.output_size_in_bytes
    # What a program is given and gives is read and written once at least.
    streamed = max(counts.streamed, ends - 2 * card.cache)
    multiplied = sum(flops / card.peaks.get(kind, card.peaks["f32"]) for kind, flops in counts.flops.items())
    return Compiled(
        **vars(counts),
        state_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in state),
        donated_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        total_bytes=ends - memory.alias_size_in_bytes + memory.temp_size_in_bytes,
        bound_s=max(multiplied, streamed / card.bandwidth),
    )


def _own_arrays(state: PyTree, shardings: Any) -> list[jax.ShapeDtypeStruct]:
    """The arrays that a device has of a state."""
    leaves = jax.tree.leaves(state)
    lie = jax.tree.leaves(shardings) if isinstance(shardings, tuple) else [shardings] * len(leaves)
    arrays = []
    for leaf, sharding in zip(leaves, lie, strict=True):
        own = jax.ShapeDtypeStruct(sharding.shard_shape(leaf.shape), leaf.dtype)
        arrays.append(jax.eval_shape(key_data, own))
    return arrays
