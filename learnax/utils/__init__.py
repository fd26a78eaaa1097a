"""Trees, arrays and names: what every room may use, and scripts beside the trainer.

The room imports no other one.
"""

from learnax.utils import lowest as lowest  # isort: skip  (before all that an older JAX lacks)
from learnax.utils.trees import (
    PyTree as PyTree,
)
from learnax.utils.trees import (
    Rows as Rows,
)
from learnax.utils.trees import (
    any_key as any_key,
)
from learnax.utils.trees import (
    describe as describe,
)
from learnax.utils.trees import (
    held as held,
)
from learnax.utils.trees import (
    is_key as is_key,
)
from learnax.utils.trees import (
    key_data as key_data,
)
from learnax.utils.trees import (
    leaves_by_path as leaves_by_path,
)
from learnax.utils.trees import (
    like_key as like_key,
)
from learnax.utils.trees import (
    same_structure as same_structure,
)
from learnax.utils.trees import (
    tree_bytes as tree_bytes,
)
from learnax.utils.trees import (
    tree_stack as tree_stack,
)
from learnax.utils.trees import (
    tree_unstack as tree_unstack,
)
from learnax.utils.trees import (
    unescaped as unescaped,
)
