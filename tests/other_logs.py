"""Logs in the files of other trackers, as their own packages leave them."""

import sqlite3
from pathlib import Path

import pytest


def event_file(path: Path) -> Path:
    """TensorBoard's, of three steps: a loss as older writers keep it, a rate as newer ones do, and a text."""
    pytest.importorskip("tensorboard", reason="event files need TensorBoard (requirements-dev.txt)")
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.summary.writer.record_writer import RecordWriter

    text = TensorProto(dtype="DT_STRING", string_val=[b"lr: high"])
    events = [
        Event(file_version="brain.Event:2"),
        Event(summary=Summary(value=[Summary.Value(tag="args", tensor=text)])),
    ]
    for step, loss in ((1, 3.0), (2, 2.0), (3, 1.0)):
        rate = TensorProto(dtype="DT_FLOAT", float_val=[0.125])
        values = Summary.Value(tag="train/lr", tensor=rate), Summary.Value(tag="train/loss", simple_value=loss)
        events += [Event(step=step, summary=Summary(value=[value])) for value in values]
    with path.open("wb") as file:
        writer = RecordWriter(file)
        for event in events:
            writer.write(event.SerializeToString())
    return path


def trackio(path: Path, *rows) -> Path:
    """trackio's, of (run, step, JSON of the metrics)."""
    with sqlite3.connect(path) as base:
        base.execute(
            "CREATE TABLE metrics (id INTEGER PRIMARY KEY, timestamp TEXT, run_name TEXT, step INTEGER, metrics TEXT)"
        )
        base.executemany("INSERT INTO metrics (run_name, step, metrics) VALUES (?, ?, ?)", rows)
    return path
