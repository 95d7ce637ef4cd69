"""`python -m dwc.train` is `dwc train`."""

import sys

from dwc.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
