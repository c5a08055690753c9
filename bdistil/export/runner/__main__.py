"""`python FOLDER/runner`: Python then knows no package, only this file."""

import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from runner.command import main  # type: ignore[import-not-found]
else:
    from .command import main

sys.exit(main())
