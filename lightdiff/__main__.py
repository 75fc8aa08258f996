"""`python -m lightdiff` is `lightdiff`."""

from lightdiff.cli import main

main()
