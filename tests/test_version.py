"""--version and --help of every command: the version is said in one place, and neither waits for torch."""

import importlib
import re
import subprocess
import sys

import pytest

from psla_sb import __version__
from runs import REPOSITORY

COMMANDS = dict(re.findall(r'"(psla-[a-z]+) = ([a-z_.]+:[a-z_]+)"', (REPOSITORY / "setup.py").read_text(encoding="utf-8")))
CODE = """
import contextlib, importlib, sys
for entry in sys.argv[1:]:
    module, _, name = entry.partition(":")
    for argument in ("--version", "--help"):
        with contextlib.suppress(SystemExit):
            getattr(importlib.import_module(module), name)([argument])
            print(entry, argument, "did not exit")
print(sorted({"torch", "speechbrain", "numpy"} & sys.modules.keys()))
"""


def said(*arguments):
    return subprocess.run([sys.executable, *map(str, arguments)], check=True, capture_output=True, text=True, cwd=REPOSITORY).stdout


def test_commands_say_it_without_torch():
    assert len(COMMANDS) == 11
    lines = said("-c", CODE, *COMMANDS.values()).splitlines()
    assert lines.count(f"psla_sb {__version__}") == len(COMMANDS)
    assert lines[-1] == "[]"
    assert not [line for line in lines if "did not exit" in line]


@pytest.mark.parametrize(
    ("module", "name", "first"),
    [
        ("psla_sb.experiment.train", "main", ["recipes/AudioSet/train.py"]),
        ("psla_sb.experiment.aggregate", "main", ["recipes/AudioSet/aggregate.py"]),
        ("psla_sb.experiment.ablate", "main", ["recipes/AudioSet/ablate.py"]),
        ("psla_sb.experiment.out_of_fold", "main", ["recipes/AudioSet/out_of_fold.py"]),
        ("psla_sb.experiment.enhance_labels", "main", ["recipes/AudioSet/enhance_labels.py"]),
        ("psla_sb.prepare.mini_audioset", "main", []),
    ],
)
def test_scripts_say_it(module, name, first, capsys):
    with pytest.raises(SystemExit) as caught:
        getattr(importlib.import_module(module), name)(*first, ["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"psla_sb {__version__}\n"


def test_the_package_has_the_version_that_the_commands_say():
    assert said("setup.py", "--version").splitlines()[-1] == __version__
    assert f"\nversion: {__version__}\n" in (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
