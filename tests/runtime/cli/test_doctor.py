"""`stepforge doctor`: what this machine can run."""

from stepforge.runtime.cli.doctor import examine


def test_doctor(run, capsys, tiny_sd1_bundle, tmp_path):
    assert run("doctor", tiny_sd1_bundle) == 0
    assert "loads all 3 networks" in capsys.readouterr().out
    assert run("doctor", tmp_path) == 1
    assert "FAIL bundle" in capsys.readouterr().out


def test_doctor_names_the_compile_cache(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for folder, text in {
        tmp_path / "new": "are kept there",
        tmp_path / "file/a": "cannot be written",
        "": "none",
    }.items():
        monkeypatch.setenv("STEPFORGE_CACHE", str(folder))
        (found,) = [finding for finding in examine() if finding.subject == "compile cache"]
        assert found.ok
        assert text in found.text
        assert str(folder) in found.text
