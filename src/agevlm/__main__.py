"""`python -m agevlm`: the command line."""

from agevlm.cli import main


if __name__ == "__main__":
    main()
