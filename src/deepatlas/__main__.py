"""`python -m deepatlas`, and the program's entry point."""

from deepatlas.cli import main

if __name__ == "__main__":
    main()
