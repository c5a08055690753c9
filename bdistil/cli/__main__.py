"""``python -m bdistil.cli`` is the program ``bdistil``."""

import sys

from bdistil.cli import main

if __name__ == "__main__":
    sys.exit(main())
