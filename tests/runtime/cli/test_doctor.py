"""`stepforge doctor`: what this machine can run."""


def test_doctor(run, capsys, tiny_sd1_bundle, tmp_path):
    assert run("doctor", tiny_sd1_bundle) == 0
    assert "loads all 3 networks" in capsys.readouterr().out
    assert run("doctor", tmp_path) == 1
    assert "FAIL bundle" in capsys.readouterr().out
