"""Run a command and report its wall clock and peak memory. Started by `run_measured`, needs nothing else.

Until a new process runs its own program the system charges it with the memory of the process it was forked
from, and keeps that as its peak. A large Python process can therefore not measure a small child; this
small one in between can.

    python _child.py REPORT_FD COMMAND [ARGUMENT ...]
"""

from __future__ import annotations

import json
import os
import sys
import time

MAXRSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024


def main() -> None:
    report, command = int(sys.argv[1]), sys.argv[2:]
    os.set_inheritable(report, False)
    started = time.perf_counter()
    child = os.posix_spawnp(command[0], command, os.environ)
    _, status, usage = os.wait4(child, 0)
    answer = {
        "seconds": time.perf_counter() - started,
        "peak_bytes": usage.ru_maxrss * MAXRSS_UNIT_BYTES,
        "exit_status": os.waitstatus_to_exitcode(status),
    }
    os.write(report, json.dumps(answer).encode())


if __name__ == "__main__":
    main()
