"""python -m cliphar."""

from cliphar.cli import main

if __name__ == "__main__":
    main()
