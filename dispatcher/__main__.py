"""`python -m dispatcher` is `flexlb`."""

import sys

from dispatcher.cli import main

sys.exit(main())
