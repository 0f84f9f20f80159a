"""Compiled kernels in the cache are checked before they are trusted."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from leetdist.kernels.runtime import nvrtc

BODY = b"\x7fELF and so on"


def test_what_is_kept_is_whole(tmp_path: Path) -> None:
    """Cut anywhere or with a bit flipped anywhere, it is not used; nor is what an older version wrote."""
    path = tmp_path / "cache" / "kernel.cubin"
    nvrtc._keep(path, BODY)
    assert nvrtc._kept(path) == BODY
    assert [x.name for x in path.parent.iterdir()] == [path.name]
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    whole = path.read_bytes()
    for at in range(len(whole)):
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 1 << random.randrange(8)]) + whole[at + 1 :]):
            path.write_bytes(damaged)
            assert nvrtc._kept(path) is None, at
    path.write_bytes(BODY)
    assert nvrtc._kept(path) is None
    assert nvrtc._kept(tmp_path / "none") is None
    path.write_bytes(whole)
    assert nvrtc._kept(path) == BODY


def test_what_others_can_write_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache" / "kernel.cubin"
    nvrtc._keep(path, BODY)
    for place, mode in ((path, 0o622), (path.parent, 0o777)):
        before = place.stat().st_mode
        place.chmod(mode)
        with pytest.warns(UserWarning, match="can be written by other users"):
            assert nvrtc._kept(path) is None
        place.chmod(before)
    assert nvrtc._kept(path) == BODY
    (path.parent / "link.cubin").symlink_to(path)
    assert nvrtc._kept(path.parent / "link.cubin") is None
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    about = path.stat()
    assert nvrtc._own(about) == (about.st_uid == 0)  # the system's own is as good as the user's
