"""The only doors: the command line, the engines, the embedded world, preflight."""
