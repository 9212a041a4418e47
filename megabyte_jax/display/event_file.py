"""Writes numbers by step for TensorBoard, in this thread: an error of the disk is raised where it is met."""

from __future__ import annotations

import os
import time

from etils import epath

_FLUSH_SECONDS = 120.0  # what is written waits in memory no longer than this, or until `flush`


class EventFile:
  """A new file of events in a folder."""

  def __init__(self, folder: epath.PathLike, first_step: int):
    """Begins the file.

    Args:
      folder: of all event files of a run; made if it is missing.
      first_step: TensorBoard forgets what earlier files say of this step and later ones.
    """
    from tensorboardX.event_file_writer import EventsWriter  # noqa: PLC0415  (half a second; evaluation needs none)
    from tensorboardX.proto import event_pb2  # noqa: PLC0415
    from tensorboardX.record_writer import directory_check  # noqa: PLC0415

    directory_check(os.fspath(folder))
    self._writer = EventsWriter(os.path.join(os.fspath(folder), "events"))
    self._event = event_pb2.Event
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._writer.write_event(self._event(wall_time=time.time(), step=first_step, session_log=start))
    self._flushed = time.monotonic()

  def put(self, step: int, name: str, value: float) -> None:
    """Writes one number."""
    from tensorboardX.summary import scalar  # noqa: PLC0415

    self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=scalar(name, value)))
    if time.monotonic() - self._flushed >= _FLUSH_SECONDS:
      self.flush()

  def flush(self) -> None:
    """Writes what waits in memory."""
    self._writer.flush()
    self._flushed = time.monotonic()

  def close(self) -> None:
    """Writes what waits in memory and closes the file."""
    self._writer.close()
