"""Names of files and folders."""

from pathlib import Path

import pytest

import gpu_poor
from gpu_poor.examples.models import load_float
from gpu_poor.files import is_missing

HUB = ["gpt2", "org/name", "org/name-1.5B", "org.x/name"]
LOCAL = [Path("gpt2"), "./x", "../x", "/no/x", "~/no-such-folder", "x/", "x/y/z", "here/x"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to be in, with one in it."""
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", HUB)
def test_names_on_the_hub_are_not_missing(here, name):
    assert not is_missing(name)


@pytest.mark.parametrize("name", LOCAL)
def test_paths_to_nothing_are_missing(here, name):
    assert is_missing(name)


def test_what_is_there_is_not_missing(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    for name in ("here", "here/model", "./here", "here/", here, here / "here", "~/here", str(here)):
        assert not is_missing(name)


@pytest.mark.parametrize("name", ["./x", "here/x"])
def test_the_hub_is_not_asked_for_paths(here, name, monkeypatch):
    transformers = pytest.importorskip("transformers")

    def asked(*args, **kwargs):
        raise AssertionError("the hub would be asked")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", asked)
    with pytest.raises(ValueError, match=f"{name}: there is no such file or folder"):
        gpu_poor.load(name)
    with pytest.raises(OSError, match="there is no such folder"):
        load_float(name)
    for call in (gpu_poor.load, load_float):
        with pytest.raises(AssertionError, match="would be asked"):
            call("org/name")


def test_home_is_understood(here, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("HOME", str(here))
    (here / "here" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="model"):  # of transformers, which has looked into it
        gpu_poor.load("~/here")
