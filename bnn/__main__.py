"""`python -m bnn` is `bnn`."""

from bnn.cli import main

if __name__ == "__main__":
    main()
