"""Entry point of ``python -m peers``."""

import sys

from peers.main import main

sys.exit(main())
