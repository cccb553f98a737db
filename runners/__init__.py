"""The only doors: the command line, the engines, the embedded world, preflight."""

import logging

# Beam logs a warning while it is imported, and with no handler on the root logger that would
# open the terminal to everything that Beam says later.
logging.getLogger().addHandler(logging.NullHandler())
