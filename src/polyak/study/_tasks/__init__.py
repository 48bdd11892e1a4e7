"""Which tasks come with the library? All run without a download."""

from .digits import digits
from .regression import regression
from .text import text

TASKS = {"regression": regression, "digits": digits, "text": text}
"""Name -> function that builds the task: the names of the command line."""
