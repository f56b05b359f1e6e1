"""The executable: a door. What is behind it is in netloom.entry."""

import sys

if "__compiled__" not in globals():  # from source: internal/ is a path entry, as src/ is elsewhere
    import os

    sys.path[0] = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "internal")

from netloom.entry import main

if __name__ == "__main__":
    sys.exit(main(sys.argv))
