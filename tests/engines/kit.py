"""python -m engines.kit [valkey|postgresql] [ARGUMENTS]: it is started, and `python -m coheld.testing` is run on it."""

import os
import subprocess
import sys

from engines import servers

ENGINES = {"valkey": servers.valkey, "postgresql": servers.postgresql}

if __name__ == "__main__":
    arguments = sys.argv[1:]
    engine = arguments.pop(0) if arguments and arguments[0] in ENGINES else "valkey"
    with ENGINES[engine]() as server:
        command = [sys.executable, "-m", "coheld.testing", *arguments]
        status = subprocess.run(command, check=False, env=os.environ | {"COHELD_BACKEND": server.url()}).returncode
    sys.exit(status)
