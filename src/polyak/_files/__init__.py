"""Read and write weights on disk: one file a format."""

from ._atomic import written_whole as written_whole
from ._safetensors import read_tensors as read_tensors
from ._safetensors import write_tensors as write_tensors
