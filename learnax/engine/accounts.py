"""What a run's programs cost, beside where its time went."""

from __future__ import annotations

from learnax.engine.engine import Engine
from learnax.engine.plan import Plan
from learnax.profiling.costs import Costs, peak_of
from learnax.profiling.ledger import Ledger, Setting
from learnax.profiling.phases import Phases


def ledger_of(engine: Engine, phases: Phases, plan: Plan, rows: int, num_workers: int, accumulate: int) -> Ledger:
    """The ledger of a run so far.

    Args:
        engine: has the programs that were dispatched.
        phases: the run's clock.
        plan: how it is cut.
        rows: steps that it made.
        num_workers: processes that read.
        accumulate: batches of an update.
    """
    setting = Setting(
        platform=engine.devices[0].platform,
        room=plan.room,
        batches=accumulate if plan.looped else 1,
        num_workers=num_workers,
        overlaps=engine.in_flight > 0,
        peak=peak_of(engine.devices[0]),
    )
    costs: dict[str, Costs] = {}
    for program in sorted(engine.programs.values(), key=lambda program: -program.calls):
        if program.calls:
            costs.setdefault(program.kind, program.costs)
    return Ledger(phases.seconds(), rows, costs, setting)
