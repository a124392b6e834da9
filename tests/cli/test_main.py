import re
import subprocess
import sys
import types

import pytest

import moe_ep
from moe_ep.cli import main as cli
from moe_ep.errors import CapacityError


@pytest.fixture
def fake_command(monkeypatch):
    """Install a sub-command ``fake`` whose work is the function given."""

    def install(work):
        module = types.ModuleType("fake_command")
        module.add_arguments = lambda parser: parser.add_argument("--size", type=int, default=1)
        module.run = work
        monkeypatch.setitem(sys.modules, "fake_command", module)
        command = cli.Command(name="fake", summary="a command of the test", module="fake_command")
        monkeypatch.setattr(cli, "COMMANDS", (*cli.COMMANDS, command))

    return install


def raise_(error):
    raise error


def test_help_lists_every_command_in_one_line_each(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert re.search(rf"^    {command.name} +{re.escape(command.summary)}$", text, re.MULTILINE)
    assert [command.name for command in cli.COMMANDS] == ["demo", "generate", "bench", "doctor", "plan"]


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"moe-ep {moe_ep.__version__}\n"


def test_no_command_prints_help_and_fails(capsys):
    assert cli.main([]) == 2
    assert "usage: moe-ep" in capsys.readouterr().out


def test_unknown_command_fails(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["bake"])
    assert caught.value.code == 2
    assert "bake" in capsys.readouterr().err


def test_arguments_and_exit_code_go_through(fake_command):
    seen = []
    fake_command(lambda args: seen.append(args.size) or 7)
    assert cli.main(["fake", "--size", "3"]) == 7
    assert seen == [3]


@pytest.mark.parametrize(
    "error",
    [
        ValueError("size=3 must be even;\nuse 2 or 4"),
        CapacityError("size=3 must be even; use 2 or 4", rank=1, needed=3, given=2),
    ],
)
def test_known_errors_are_one_line_and_exit_2(fake_command, capsys, error):
    fake_command(lambda args: raise_(error))
    assert cli.main(["fake"]) == 2
    assert capsys.readouterr().err == "moe-ep: size=3 must be even; use 2 or 4\n"


def test_missing_optional_package_names_the_extra(fake_command, capsys):
    fake_command(lambda args: raise_(ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")))
    assert cli.main(["fake"]) == 2
    error = capsys.readouterr().err
    assert "matplotlib" in error
    assert "moe_ep[demo]" in error


def test_a_module_of_ours_that_is_missing_is_no_user_error(fake_command):
    fake_command(lambda args: raise_(ModuleNotFoundError("No module named 'moe_ep.gone'", name="moe_ep.gone")))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["fake"])


def test_other_errors_keep_their_traceback(fake_command):
    fake_command(lambda args: raise_(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["fake"])


def test_interrupt_exits_130(fake_command):
    fake_command(lambda args: raise_(KeyboardInterrupt()))
    assert cli.main(["fake"]) == 130


def test_runs_as_a_module_and_imports_only_the_chosen_command():
    code = (
        "import sys; sys.argv = ['moe-ep', 'plan', '--ranks', '2', '--experts', '8', '--top-k', '2', "
        "'--hidden', '64', '--tokens', '16']\n"
        "import runpy\n"
        "try:\n    runpy.run_module('moe_ep', run_name='__main__')\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "others = [name for name in sys.modules if name.startswith(('moe_ep.cli.demo', 'moe_ep.cli.bench', "
        "'moe_ep.cli.doctor'))]\n"
        "assert not others, others\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "ranks per token" in done.stdout
