"""`python -m fastmimi`: the command line."""

from fastmimi.cli import main

if __name__ == "__main__":
    main()
