"""What tests of the command line share."""

import pytest

from deepatlas.cli import main


@pytest.fixture
def call(capsys):
    """Run the command line: exit code, stdout, stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return end.value.code or 0, said.out, said.err

    return run
