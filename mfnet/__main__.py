"""``python -m mfnet``: the command line."""

from mfnet.cli import main

main()
