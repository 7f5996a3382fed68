"""`python -m turbolens.cli`."""

from turbolens.cli import main

if __name__ == "__main__":
    main()
