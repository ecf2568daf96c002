"""What is compiled when, and what is kept of it; the compiler itself needs a GPU's driver and is stood in for."""

import pytest

from ddpkit import InputError, nvrtc


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """The texts that were compiled."""
    texts = []

    def compile_text(text, kind):
        texts.append(text)
        return f"{kind}: {text}".encode()

    monkeypatch.setattr(nvrtc, "_compiled", compile_text)
    monkeypatch.setattr(nvrtc, "_kind", lambda _: "sm_90")
    monkeypatch.setattr(nvrtc, "folder_of_cache", lambda: str(tmp_path))
    return texts


def test_what_is_missing_is_compiled_once(compiled):
    nvrtc._compile_all({"a", "b", "c"}, 0)
    assert sorted(compiled) == ["a", "b", "c"]
    nvrtc._compile_all({"a", "b", "c", "d"}, 0)
    assert sorted(compiled) == ["a", "b", "c", "d"]
    assert nvrtc._binary("b", "sm_90") == b"sm_90: b"
    assert len(compiled) == 4


def test_a_damaged_file_is_compiled_again(compiled):
    nvrtc._compile_all({"a"}, 0)
    nvrtc._path("a", "sm_90").write_bytes(b"cut off")
    assert nvrtc._binary("a", "sm_90") == b"sm_90: a"
    assert compiled == ["a", "a"]


def test_what_cannot_be_compiled_is_told(monkeypatch, tmp_path):
    def refuse(text, kind):
        raise InputError(f"{text} for {kind}")

    monkeypatch.setattr(nvrtc, "_compiled", refuse)
    monkeypatch.setattr(nvrtc, "_kind", lambda _: "sm_90")
    monkeypatch.setattr(nvrtc, "folder_of_cache", lambda: str(tmp_path))
    with pytest.raises(InputError, match="a for sm_90"):
        nvrtc._compile_all({"a"}, 0)
