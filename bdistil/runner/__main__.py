"""Entry point of `python FOLDER/runner`, which Python runs as a file outside of any package."""

import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from runner.command import main  # type: ignore[import-not-found]
else:
    from .command import main

sys.exit(main())
