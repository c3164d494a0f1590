"""Entry point of ``python -m programs``."""

import sys

from programs.main import main

sys.exit(main())
