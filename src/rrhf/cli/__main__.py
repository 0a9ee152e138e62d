"""``python -m rrhf.cli`` is the command ``rrhf``."""

import sys

from rrhf.cli.main import main

sys.exit(main())
