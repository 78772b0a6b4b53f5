"""Run a command, and restart it when a Python file below a directory changes: reload.py DIRECTORY COMMAND …

Runs until SIGTERM. A command that ends by itself is started again at the next change.
"""

import signal
import subprocess
import sys

from watchfiles import PythonFilter, watch

PATIENCE = 10  # seconds for a command to stop


def main() -> None:
    directory, *command = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    process = subprocess.Popen(command)  # noqa: S603
    try:
        for changes in watch(directory, watch_filter=PythonFilter()):
            print(f"==> {', '.join(sorted({path for _, path in changes}))}: restarting", flush=True)
            stop(process)
            process = subprocess.Popen(command)  # noqa: S603
    except KeyboardInterrupt:
        pass  # `watch` raises this at every signal
    finally:
        stop(process)


def stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
