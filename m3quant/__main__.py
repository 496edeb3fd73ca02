"""`python -m m3quant`: the same as the `m3quant` command."""

from .cli import main

main()
