"""A replay memory on the disk beside the checkpoints, row by row as it fills."""

import errno
import math
import os
import zlib
from pathlib import Path

import numpy as np

from lrrl_utils.files import open_regular

BLOCK = 1000  # rows that have a checksum together


class Journal:
    """The newest rows of a replay memory, written through to a file from which a resumed run reads them back.

    So a checkpoint need not copy them, only their checksums. The file has room for more rows than the memory, so that
    those that belong to a checkpoint are still there when newer ones have been written after it.

    Args:
        path: of the file.
        dtype: of a row, a NumPy type.
        rings: rings in the memory.
        capacity: rows of a ring that the memory holds.
        spare: rows that a ring may get between a checkpoint and the one after the next.

    Raises:
        OSError: the file cannot be written, or is no regular file.
    """

    def __init__(self, path, dtype, rings, capacity, spare):
        self.dtype, self.capacity, self.length = np.dtype(dtype), capacity, capacity + spare + BLOCK
        self.path, self.rings = Path(path), rings  # rows stay where they are when there get to be more
        self.file = open_regular(path, os.O_RDWR | os.O_CREAT)
        self.checksums = [{} for _ in range(rings)]  # {block: of its rows so far}

    def write(self, ring, index, row):
        """Write `row`, the `index`-th that its ring gets.

        Raises:
            OSError: it cannot be written.
        """
        ring, index = int(ring), int(index)
        place = index % self.length * self.rings + ring
        data = row.tobytes()
        if os.pwrite(self.file, data, place * self.dtype.itemsize) < self.dtype.itemsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        block, checksums = index // BLOCK, self.checksums[ring]
        checksums[block] = zlib.crc32(data, checksums.get(block, 0))
        checksums.pop(block - self.length // BLOCK - 1, None)  # of rows that are overwritten by now

    def read(self, ring, count):
        """The newest rows, at most `capacity`, of a ring that has got `count`: pairs of an index and rows.

        Raises:
            ValueError: they are not those that were written.
        """
        size = self.length * self.rings * self.dtype.itemsize
        os.truncate(self.file, max(os.fstat(self.file).st_size, size))
        rows = np.memmap(self.path, self.dtype, "r", shape=(self.length, self.rings))
        first = max(count - self.capacity, 0)
        for block in range(first // BLOCK, math.ceil(count / BLOCK)):  # so few that they fit into memory twice
            index = np.arange(block * BLOCK, min((block + 1) * BLOCK, count))
            found = rows[index % self.length, ring]
            if zlib.crc32(found.tobytes()) != self.checksums[ring].get(block):
                raise ValueError("it is damaged, or not of this run")
            yield max(index[0], first), found[max(first - index[0], 0) :]

    def state_dict(self):
        return {"checksums": self.checksums}

    def load_state_dict(self, state):
        self.checksums = [dict(checksums) for checksums in state["checksums"]]

    def close(self, keep):
        os.close(self.file)
        if not keep:
            self.path.unlink(missing_ok=True)
