"""`python -m gracehooks.anchor …` is `gracehooks run …`; executed by its path, this file is the anchor proper.

By its path it stands alone: the package `gracehooks` is then only a place to find modules in, since its `__init__` brings
what a server needs and the anchor does not.
"""

from __future__ import annotations

import os
import sys

if __package__:
    from gracehooks.anchor import main
else:
    root = type(sys)("gracehooks")
    root.__path__ = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
    sys.modules["gracehooks"] = root
    from gracehooks.anchor.driver import main

sys.exit(main(sys.argv[1:]))
