"""Read and write weights on disk: one file a format."""

from ._atomic import written_whole as written_whole
from ._checkpoint import Checkpoint as Checkpoint
from ._open import open_checkpoint as open_checkpoint
from ._safetensors import write_tensors as write_tensors
from ._stored import TensorInfo as TensorInfo
from ._writer import Writer as Writer
from ._writer import checkpoint_writer as checkpoint_writer
