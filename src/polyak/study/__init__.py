"""Does averaging help here, which kind, how long? Several seeds, a table, pictures, a verdict.

Needs `pip install "polyak[study]"`. `run_study(task)` runs a `Task`, one of `TASKS` or a person's
own; `polyak study` does the same from the command line.
"""

from . import _extra as _extra
from ._folder import check_folder as check_folder
from ._methods import Averaged as Averaged
from ._methods import Tail as Tail
from ._methods import Windowed as Windowed
from ._methods import ema as ema
from ._methods import power as power
from ._methods import usual_methods as usual_methods
from ._methods import window as window
from ._metrics import Metric as Metric
from ._metrics import accuracy as accuracy
from ._metrics import mean_outputs as mean_outputs
from ._metrics import mean_probabilities as mean_probabilities
from ._metrics import r2 as r2
from ._run import RunError as RunError
from ._run import processors as processors
from ._study import Study as Study
from ._study import run_study as run_study
from ._task import Data as Data
from ._task import Published as Published
from ._task import Task as Task
from ._tasks import TASKS as TASKS
from ._train import Moment as Moment
from ._verdict import Verdict as Verdict

__all__ = [
    "TASKS",
    "Averaged",
    "Data",
    "Metric",
    "Moment",
    "Published",
    "RunError",
    "Study",
    "Tail",
    "Task",
    "Verdict",
    "Windowed",
    "accuracy",
    "check_folder",
    "ema",
    "mean_outputs",
    "mean_probabilities",
    "power",
    "processors",
    "r2",
    "run_study",
    "usual_methods",
    "window",
]
