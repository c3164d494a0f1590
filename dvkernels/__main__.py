"""``python -m dvkernels``."""

import sys

from dvkernels.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
