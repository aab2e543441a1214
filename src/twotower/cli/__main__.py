"""`python -m twotower.cli`, for environments without the installed command."""

import sys

from twotower.cli.main import main

sys.exit(main())
