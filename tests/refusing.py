"""What a refusal of the command line looks like."""


def refused(result, *words):
    """The line of a refusal, after checks that it is one line and holds some words."""
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, len(lines)) == (1, 1), err
    assert "Traceback" not in err
    for word in words:
        assert word in lines[0]
    return lines[0]
