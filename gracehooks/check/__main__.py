"""`python -m gracehooks.check`."""

import sys

from gracehooks.check import main

if __name__ == "__main__":
    sys.exit(main())
