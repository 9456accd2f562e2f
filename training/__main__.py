"""`python -m training` in a checkout, `python -m saferope_training` where it is installed."""

from .cli import main

if __name__ == "__main__":
    main()
