"""``python -m tnt_fast``: the command ``tnt-fast``."""

import sys

from tnt_fast.cli import main

sys.exit(main())
