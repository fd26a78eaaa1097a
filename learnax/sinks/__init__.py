"""Places that a run's metrics go to, beside wandb: files, TensorBoard, a page to look at.

The room may import utils; it must not know the trainer, its parts or JAX: it is given rows and plain data.
"""

from learnax.sinks.files import Csv as Csv
from learnax.sinks.files import JsonLines as JsonLines
from learnax.sinks.report import Report as Report
from learnax.sinks.sink import Histogram as Histogram
from learnax.sinks.sink import Image as Image
from learnax.sinks.sink import Sink as Sink
from learnax.sinks.sink import Start as Start
from learnax.sinks.tensorboard import TensorBoard as TensorBoard
