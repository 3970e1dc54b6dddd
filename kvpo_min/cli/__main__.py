"""`python -m kvpo_min.cli`, for torchrun"""

import sys

from kvpo_min.cli import main

if __name__ == "__main__":
    sys.exit(main())
