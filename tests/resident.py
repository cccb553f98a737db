"""Run the command in a process of its own and learn how much memory it has had."""

import subprocess
import sys

# A child's `ru_maxrss` begins with what the process was that started it: only the child itself
# knows what it has had since.
_CODE = """\
import re, sys
from runners.cli import main
code = main(sys.argv[1:])
with open("/proc/self/status") as status:
    print(re.search(r"VmHWM:\\s*(\\d+) kB", status.read())[1])
sys.exit(code)
"""


def run_command(*arguments: str) -> tuple[str, float]:
    """Returns what `campus-sync` printed and its largest memory in MiB; any exit code will do."""
    done = subprocess.run(
        [sys.executable, "-c", _CODE, *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    text, _, resident = done.stdout.rstrip("\n").rpartition("\n")
    return text, int(resident) / 1024
