"""What a run is made of, from its settings, and where it stands.

The room may import everything but the trainer, the loop and what frames it; it must not know when anything is called.
"""

from learnax.parts.parts import NAME as NAME
from learnax.parts.parts import Fit as Fit
from learnax.parts.parts import Parts as Parts
from learnax.parts.parts import Preflight as Preflight
