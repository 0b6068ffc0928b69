"""Standard output and error may be closed or full: the work is done all the same."""

import io

from stepforge.runtime.cli.output import Stream, print_table

MANY = [f"prompt-{number}" for number in range(40)]
SMALL = ("-n", 1, "--width", 64, "--height", 64)


def test_a_reader_that_has_enough_costs_no_image(start, tmp_path):
    process = start("generate", "fake", *MANY, "-o", tmp_path / "out", *SMALL)
    process.stdout.readline()
    process.stdout.close()  # as `head -1` does
    assert process.stderr.read() == ""
    assert process.wait(60) == 0
    assert len(list((tmp_path / "out").iterdir())) == len(MANY)


def test_a_full_device_as_output_costs_no_image(start, tmp_path):
    with open("/dev/full", "w") as full:
        process = start("generate", "fake", "x", "y", "-o", tmp_path / "out", *SMALL, stdout=full)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 1
        assert error == "stepforge: cannot write to standard output: No space left on device\n"
        assert len(list((tmp_path / "out").iterdir())) == 2
        process = start("generate", "fake", "x", "-o", tmp_path / "out", *SMALL, stderr=full)
        assert process.wait(60) == 2
        process = start("--help", stdout=full)
        assert process.communicate(timeout=60)[1].count("\n") == 1
        assert process.returncode == 1


def test_letters_without_a_code_are_escaped():
    buffer = io.BytesIO()
    stream = Stream(io.TextIOWrapper(buffer, "ascii"))
    print("caf\u00e9 \udce9", file=stream)
    stream.flush()
    assert buffer.getvalue() == rb"caf\xe9 \udce9" + b"\n"


def test_table_cells_cannot_command_the_terminal(capsys):
    print_table([{"name": "\x1b[2J" + "x" * 1000, "value": 0.5, "numbers": [1.0, -2.5]}])
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "0.5  +1 -2.5" in text
    assert max(len(line) for line in text.splitlines()) <= 200
