"""Whether pytest sees the build with sanitizers, and not another one of this tree."""

from __future__ import annotations

import dlops


def test_build() -> None:
    assert "build/sanitize" in dlops.__file__, dlops.__file__
