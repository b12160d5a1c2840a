"""``retrograde`` and ``python -m retrograde``: the command-line tool, where what it needs is installed."""

import json
import sys

from retrograde.errors import MissingPackageError


def main() -> int:
    """Run the command line of this process; the exit code."""
    try:
        from retrograde.cli import main as run
    except MissingPackageError as error:
        name, message = type(error).__name__, str(error)
        if "--json" in sys.argv:
            sys.stdout.write(json.dumps({"error": {"type": name, "message": message}}) + "\n")
        sys.stderr.write(f"{name}: {message}\n")
        return 3  # bad input, as of every error of the command line
    return run()


if __name__ == "__main__":
    raise SystemExit(main())
