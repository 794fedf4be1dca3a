"""`python -m preprocess.cli`: the same as the console command."""

from preprocess.cli.main import main

main()
