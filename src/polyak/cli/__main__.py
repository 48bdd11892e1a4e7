"""`python -m polyak.cli`, where the script `polyak` is not on the path."""

import sys

from polyak.cli import main

sys.exit(main())
