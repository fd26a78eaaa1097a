"""How a run is cut: the steps that one dispatch makes, by a rule that gives the same answer each time."""

from __future__ import annotations

import dataclasses
import functools

FUSED = 16
"""Steps in a dispatch where fusing pays: enough to hide what a dispatch costs the host."""
BLOCK_BYTES = 64 << 20
"""What the batches of one dispatch may take, on the host and again on the devices; up to four such blocks are alive."""
SMALL_STATE_BYTES = 100_000_000
"""What the state of a model may take whose steps are fused on a GPU. Measured on an H100 (`python -m bench.fusing`): a
step of an MLP of 52 MB of state took 0.62 of a dispatch of its own, one of a GPT of 119 MB as long as that."""
RESIDENT_BYTES = 1 << 30
"""What a list of data may take to be stacked once and kept on the devices."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How many steps a dispatch makes at most, and why.

    Attributes:
        room: steps.
        why: the reason, for a person.
        looped: whether the model is as fast inside a loop as outside.
        step_bytes: size of a step's data.
        selects: whether the NaN guard selects between two states, or makes the update in a loop; see
            `learnax.step.guard`.
    """

    room: int
    why: str
    looped: bool
    step_bytes: int = dataclasses.field(default=0, compare=False)
    selects: bool = dataclasses.field(default=False, compare=False)

    def __str__(self) -> str:
        size = self.room * self.step_bytes / (1 << 20)
        return f"{self.room} step(s) per dispatch: {self.why}; a dispatch's data take {size:.3g} MB"


def selects(platform: str) -> bool:
    """Whether the NaN guard selects on these devices.

    Compiled for an H100, a select costs no loop, no copy of the state and no memory; on a CPU it costs all of them.
    """
    return platform != "cpu"


def plan(
    asked: int | str,
    platform: str,
    primitives: frozenset[str],
    step_bytes: int,
    epoch_steps: int | None,
    state_bytes: int,
) -> Plan:
    """Decides how many steps a dispatch makes.

    No clock is asked: two runs of one script, and a resumed one, decide alike.

    Args:
        asked: `steps_per_execution`: a number, or "auto".
        platform: of the devices, "cpu" for one.
        primitives: names of the JAX primitives that model and losses are made of.
        step_bytes: size of a step's data.
        epoch_steps: steps in an epoch, or None where nobody knows; more in a dispatch would be padding.
        state_bytes: size of the training state.
    """
    # Measured on a 2-core CPU: a convolution inside a loop takes 9 times as long as outside.
    looped = not (platform == "cpu" and "conv_general_dilated" in primitives)
    made = functools.partial(Plan, looped=looped, step_bytes=step_bytes, selects=selects(platform))
    if asked != "auto":
        return made(min(int(asked), epoch_steps or int(asked)), "as asked for, or as many as an epoch has")
    if platform not in ("cpu", "gpu"):
        return made(1, f"fusing is not measured on {platform}")
    if platform == "gpu" and state_bytes > SMALL_STATE_BYTES:
        return made(1, f"with {state_bytes / 1e6:.0f} MB of state, a step takes longer than its dispatch")
    if not looped:
        return made(1, "a convolution is slower inside a loop on a CPU")
    room = FUSED
    while room > 1 and room * step_bytes > BLOCK_BYTES:
        room //= 2
    why = "dispatches cost more than steps" if room == FUSED else f"their data must fit into {BLOCK_BYTES >> 20} MB"
    return made(min(room, epoch_steps or room), why)
