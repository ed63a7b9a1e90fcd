"""Options of a service: sizes are read, what makes no sense is told."""

import pytest

from ttt_megatron.cli.main import main
from ttt_megatron.errors import UserError
from ttt_megatron.service.options import ServiceOptions, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 << 30), ("1.5 kb", 1500), ("500MB", 500_000_000), ("12", 12), ("2ti", 2 << 40)],
)
def test_sizes(text, size):
    assert parse_bytes(text, "memory") == size


@pytest.mark.parametrize("text", ["", "lots", "-1GB", "4 PiB", "1i", "GiB"])
def test_no_sizes(text):
    with pytest.raises(UserError, match=f"--memory {text}: give a size"):
        parse_bytes(text, "memory")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--memory", "0"), ("--max-batch", "0"), ("--max-wait", "-1"), ("--port", "70000")],
)
def test_the_command_refuses_what_makes_no_sense(option, value, tmp_path, capsys):
    assert main(["serve", str(tmp_path), f"{option}={value}"]) == 2
    assert f"error: {option} {value}" in capsys.readouterr().err


def test_saving_needs_a_place():
    with pytest.raises(UserError, match="give --session-dir"):
        ServiceOptions(save_every_request=True)
