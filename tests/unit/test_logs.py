"""Log lines: JSON that a program reads, text that a person reads, both with the figures."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime

import click
import pytest

from pagemgr.cli.main import main
from pagemgr.logs import JsonFormatter, TextFormatter


def record(message: str = "swapped %s", *args: object, **figures: object) -> logging.LogRecord:
    logger = logging.getLogger("pagemgr.test")
    return logger.makeRecord(logger.name, logging.INFO, __file__, 1, message, args, None, extra=figures)


def test_a_line_is_one_object_with_its_figures() -> None:
    line = JsonFormatter().format(record("swapped %s", "out", blocks=3, seconds=0.5, tier="device"))
    assert "\n" not in line
    fields = json.loads(line)
    assert datetime.fromisoformat(fields.pop("time")).tzinfo is not None
    assert fields == {
        "level": "info",
        "logger": "pagemgr.test",
        "message": "swapped out",
        "blocks": 3,
        "seconds": 0.5,
        "tier": "device",
    }


def test_whatever_is_logged_stays_one_line_of_json() -> None:
    line = JsonFormatter().format(record("a\nb\u2028c\udc80", odd=object(), text="\x00\xff"))
    assert len(line.splitlines()) == 1
    assert json.loads(line)["message"].startswith("a\nb")


def test_an_exception_comes_along() -> None:
    try:
        raise ValueError("no")
    except ValueError:
        one = logging.LogRecord("pagemgr", logging.ERROR, __file__, 1, "failed", (), sys.exc_info())
    assert "ValueError: no" in json.loads(JsonFormatter().format(one))["exception"]
    assert "ValueError: no" in TextFormatter().format(one)


def test_text_has_the_figures_behind_the_message() -> None:
    assert TextFormatter().format(record("swapped %s", "in", blocks=3)).endswith("pagemgr.test: swapped in blocks=3")


@pytest.fixture
def _quiet_again() -> object:
    logger = logging.getLogger("pagemgr")
    before = logger.handlers[:], logger.level
    yield
    logger.handlers[:], level = before
    logger.setLevel(level)


@pytest.mark.usefixtures("_quiet_again")
@pytest.mark.parametrize(
    ("options", "logger", "shown"),
    [
        ({"verbose": 1, "log_format": "json"}, "pagemgr.backends", True),
        ({"verbose": 0, "log_format": "json"}, "pagemgr.backends", False),
        ({"verbose": 0, "log_format": "json"}, "pagemgr.native", True),  # a build takes a while, and says so
    ],
)
def test_the_command_line_logs_json(options, logger, shown, capsys: pytest.CaptureFixture[str]) -> None:
    with click.Context(main) as context:
        context.invoke(main.callback, **options)
        logging.getLogger(logger).info("hello", extra={"n": 1})
    logging.getLogger(logger).info("after the command")
    lines = capsys.readouterr().err.splitlines()
    assert [(line["message"], line["n"]) for line in map(json.loads, lines)] == [("hello", 1)] * shown
