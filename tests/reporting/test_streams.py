"""A stream that cannot be written any more drops its text."""

from __future__ import annotations

import io
import os

from difrl.reporting.terminal import RunFacts, open_display
from difrl.reporting.terminal.streams import DroppedWhenClosed


def test_text_is_written_as_long_as_somebody_reads_and_dropped_afterwards() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        output = DroppedWhenClosed(stream)
        assert (output.write("one\n"), output.encoding) == (4, stream.encoding)
        output.flush()
        assert os.read(reader, 100) == b"one\n"
        os.close(reader)
        for _ in range(3):
            assert output.write("two\n") == 4
            output.flush()  # the last flush is Python's own, when the stream is closed


def test_a_display_outlives_its_reader() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        display = open_display(stream)
        os.close(reader)
        display.start(RunFacts("run", 1, 1, (), "runs/run"))
        display.message("a line")
        display.close()


def test_a_stream_without_a_file_is_written() -> None:
    page = io.StringIO()
    display = open_display(page)
    display.message("a line")
    display.close()
    assert page.getvalue() == "a line\n"
