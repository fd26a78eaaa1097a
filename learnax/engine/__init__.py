"""Pure functions to compiled programs on a set of devices: what is compiled when, how arrays lie, what a run will take.

The room may import the step, data, checkpoints and the clock; it must not know the loop, hooks or where metrics go.
"""

from learnax.engine.engine import (
    BATCHES as BATCHES,
)
from learnax.engine.engine import (
    MANY_PROGRAMS as MANY_PROGRAMS,
)
from learnax.engine.engine import (
    SAME as SAME,
)
from learnax.engine.engine import (
    SPLIT as SPLIT,
)
from learnax.engine.engine import (
    Engine as Engine,
)
from learnax.engine.engine import (
    Kind as Kind,
)
from learnax.engine.engine import (
    Program as Program,
)
from learnax.engine.engine import (
    Wanted as Wanted,
)
from learnax.engine.engine import (
    check_compiling as check_compiling,
)
