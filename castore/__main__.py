"""`python -m castore` is the `castore` command."""

from castore.cli.main import main

main()
