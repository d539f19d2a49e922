"""`python -m gracehooks`: the command line."""

import sys

from gracehooks.cli import main

sys.exit(main())
