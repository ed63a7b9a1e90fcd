"""Dispatch, exit statuses, and what --help costs."""

import importlib
import subprocess
import sys

import pytest

from ttt_megatron import __version__
from ttt_megatron.cli import main as cli
from ttt_megatron.config import load_recipe


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "ttt_megatron.cli.main", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_lists_every_command_and_imports_no_torch():
    code = (
        "import sys\n"
        "from ttt_megatron.cli.main import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "assert 'torch' not in sys.modules and 'yaml' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, (_, text) in cli.COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert text in done.stdout


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_the_table_agrees_with_the_modules(name, capsys):
    module = importlib.import_module(cli.COMMANDS[name][0])
    assert name == module.NAME
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert module.EPILOG.strip() in printed
    assert module.HELP.split()[0] in printed
    assert f"usage: ttt-megatron {name}" in printed


def test_version_and_no_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"ttt-megatron {__version__}\n"
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().err


def test_user_errors_are_one_line_and_exit_2(tmp_path, capsys):
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == "error: there is no command trian; did you mean train?\n"
    assert cli.main(["config", str(tmp_path / "none.yaml")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert cli.main(["config"]) == 2


def test_an_interrupt_exits_130(monkeypatch, capsys):
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("ttt_megatron.cli.config.run", interrupted)
    assert cli.main(["config", "--keys"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_config_prints_what_a_recipe_can_read_again(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("optimizer: {lr: 1e-2}\n")
    done = run("config", str(recipe), "inner.mode=off", "training.steps=7")
    assert done.returncode == 0, done.stderr
    again = tmp_path / "again.yaml"
    again.write_text(done.stdout)
    config = load_recipe(again)
    assert config == load_recipe(recipe, ["inner.mode=off", "training.steps=7"])
    assert (config.optimizer.lr, config.inner.mode, config.training.steps) == (0.01, "off", 7)


def test_a_reader_that_leaves_is_no_error():
    code = (
        "import sys\nfrom ttt_megatron.cli.main import main\nsys.exit(main(['config', '--keys']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert errors == ""


def test_keys_prints_the_reference(capsys):
    assert cli.main(["config", "--keys"]) == 0
    assert "| `inner.chunk_size` | `1024` | an integer |" in capsys.readouterr().out
