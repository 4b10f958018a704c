"""`python -m preble`."""

import sys

from preble.cli import main

sys.exit(main())
