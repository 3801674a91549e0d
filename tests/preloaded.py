"""What the server of `forked.py` imports."""

from forked import import_everything

import_everything()
