"""python -m engines.kit [ARGUMENTS]: a Valkey is started, and `python -m coheld.testing` is run on it."""

import os
import subprocess
import sys

from engines import servers

if __name__ == "__main__":
    with servers.valkey() as server:
        command = [sys.executable, "-m", "coheld.testing", *sys.argv[1:]]
        status = subprocess.run(command, check=False, env=os.environ | {"COHELD_BACKEND": server.url()}).returncode
    sys.exit(status)
