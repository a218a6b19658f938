"""`python -m bitlathe`: the command line."""

from bitlathe.cli import main

if __name__ == "__main__":
    main()
