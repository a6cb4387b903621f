"""The wall clock of one node, which can be set back while the node runs (see shim/clock.c).

In: gcc. Out: ``WallClock``, whose ``environ`` goes to the node. Always holds: other nodes and the engine keep the machine's time.
"""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path


class WallClock:
    def __init__(self, folder: Path, gcc: str) -> None:
        self._file = folder / "wall-clock"
        self.set(0.0)
        library = folder / "clock.so"
        source = Path(__file__).parent / "shim" / "clock.c"
        subprocess.run(
            [gcc, "-O1", "-fPIC", "-shared", "-Wall", "-Werror", "-o", library, source], check=True, timeout=60
        )
        self.environ = {"LD_PRELOAD": str(library), "HISS_TEST_CLOCK": str(self._file)}

    def set(self, ahead_s: float) -> None:
        """From now on; negative: behind."""
        content = struct.pack("<q", round(ahead_s * 1e9))
        if self._file.exists():
            with self._file.open("r+b") as file:  # in place: it is mapped
                file.write(content)
        else:
            self._file.write_bytes(content)
