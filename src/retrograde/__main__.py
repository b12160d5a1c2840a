"""``python -m retrograde``: the command-line tool."""

from retrograde.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
