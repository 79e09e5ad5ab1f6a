"""What is measured or made in a process of its own: `python -m rorqual.bench ours|machine|build
JSON`. Results are lines of JSON.
"""

import json
import sys

from rorqual.errors import RorqualError


def main() -> None:
    name, asked = sys.argv[1], json.loads(sys.argv[2])
    if name == "ours":
        from rorqual.bench.ours import main as work
    elif name == "machine":
        from rorqual.bench.machine import main as work
    else:
        assert name == "build", f"nothing is called {name}"
        from rorqual.bench.models import main as work
    try:
        work(asked)
    except RorqualError as problem:
        print(problem, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
