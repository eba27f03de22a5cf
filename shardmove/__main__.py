"""`python -m shardmove`: the command line."""

from shardmove.cli.app import main

if __name__ == "__main__":
    main()
