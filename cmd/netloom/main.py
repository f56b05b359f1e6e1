"""The executable. netloom.entry chooses what it does."""

import sys

if "__compiled__" not in globals():  # in a checkout: add internal/ to the module path
    import os

    sys.path[0] = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "internal")

from netloom.entry import main

if __name__ == "__main__":
    sys.exit(main(sys.argv))
