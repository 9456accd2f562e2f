"""`python -m saferope`: the command, for launchers that start a module."""

from .cli import main

if __name__ == "__main__":
    main()
