"""`python -m train.cli`: the same as the console command."""

from train.cli.main import main

main()
