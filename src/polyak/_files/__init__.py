"""Read and write weights on disk: one file a format."""

from ._atomic import check_place as check_place
from ._atomic import folder_for_a_while as folder_for_a_while
from ._atomic import folder_written_whole as folder_written_whole
from ._atomic import written_whole as written_whole
from ._checkpoint import Checkpoint as Checkpoint
from ._checkpoint import Later as Later
from ._checkpoint import Unreadable as Unreadable
from ._dcp import outline as outline
from ._open import open_checkpoint as open_checkpoint
from ._open import open_contents as open_contents
from ._safetensors import write_tensors as write_tensors
from ._stored import Boxed as Boxed
from ._stored import TensorInfo as TensorInfo
from ._team import ALONE as ALONE
from ._team import Team as Team
from ._team import team_among as team_among
from ._team import team_of as team_of
from ._writer import Writer as Writer
from ._writer import check_ending as check_ending
from ._writer import checkpoint_writer as checkpoint_writer
from ._writer import file_writer as file_writer
