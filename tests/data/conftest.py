"""Small real images and videos."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def png() -> bytes:
    return encoded("PNG")


def encoded(kind: str, size: tuple[int, int] = (24, 16)) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format=kind)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path, png) -> Path:
    """A folder with one file of every kind that a row may name."""
    inside = tmp_path / "user"
    inside.mkdir()
    (inside / "a.png").write_bytes(png)
    (inside / "b.jpg").write_bytes(encoded("JPEG"))
    (inside / "c.webp").write_bytes(encoded("WEBP"))
    (inside / "cut.png").write_bytes(png[: len(png) // 2])
    (inside / "cut.jpg").write_bytes(encoded("JPEG")[:-200])
    (inside / "text.png").write_text("no image")
    (inside / "empty.png").write_bytes(b"")
    (inside / "thin.png").write_bytes(encoded("PNG", (804, 4)))
    (tmp_path / "outside.png").write_bytes(png)
    (inside / "link.png").symlink_to(tmp_path / "outside.png")
    return inside
