"""8 record: an append-only journal that a killed process can't lose.

Theory of operation
-------------------
A *segment* is a file of one worker incarnation, preallocated, mapped into memory, with an `flock` held on it for as long as
its writer lives. An append copies `length, crc32, payload` into the mapping: no system call, and the bytes are in the page
cache, where `kill -9` doesn't reach them. `fdatasync` once a second, in a thread, bounds what a power cut can take.

The crc covers length and payload, so a reader that meets a half-written frame sees a frame that isn't there yet. Of a dead
writer such a frame is the end: whoever wrote it died before releasing the answer's last bytes.

Names: `<incarnation>-<sequence>.seg`; a segment being prepared is `.next` and gets its name when it is needed. A segment that
is full ends in an END mark and is cut to its length. The lock of an incarnation's newest segment is what says that it lives:
process ids mean nothing across containers.

To the journal a disk is full while there is room left: the last of it belongs to the collector, which makes the journal shorter
by storing it elsewhere. Of the segment that is there then, an eighth is kept for closing records whose openings are in the
journal. What can't be kept is counted, and everything goes on by itself when there is room again.

`segment.py` has the bytes (no clock, no asyncio), `writer.py` appends, `reader.py` follows, `content.py` is the frame of a
captured prompt and answer (in a journal of their own, which is dropped first), `heartbeat.py` is the small live file beside them.
"""

from proxy.journal.content import Content, decode_content, encode_content
from proxy.journal.heartbeat import BackendBeat, Heartbeat, HeartbeatFile, read_heartbeats, remove_heartbeat
from proxy.journal.reader import Batch, Checkpoint, Tail
from proxy.journal.writer import Journal, JournalFull

__all__ = [
    "BackendBeat",
    "Batch",
    "Checkpoint",
    "Content",
    "Heartbeat",
    "HeartbeatFile",
    "Journal",
    "JournalFull",
    "Tail",
    "decode_content",
    "encode_content",
    "read_heartbeats",
    "remove_heartbeat",
]
