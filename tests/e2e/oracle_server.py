"""`python -m tests.e2e.oracle_server CONFIG.yaml ...`: the real server, with oracles for workers."""

import sys

from minserve.serve import main
from tests.e2e.oracle import BOOT

if __name__ == "__main__":
    sys.exit(main(boot=BOOT))
