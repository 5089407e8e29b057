"""What the tests of a user's mistakes share."""

from pathlib import Path


def each_ends_in_one_line(fails, capsys, cases):
    """cases: [(arguments, what the line must say)]; all are tried. Nothing may be left behind."""
    problems = []
    for args, message in cases:
        try:
            assert message in fails(capsys, *args)
        except Exception as e:  # the rest is tried, too
            problems.append(f"{args}: {type(e).__name__}: {e}")
    assert not problems, "\n".join(problems)
    assert not Path("runs").exists() and not Path("out").exists()
