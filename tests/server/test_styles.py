from __future__ import annotations

from pathlib import Path

import pytest

from fastsd.errors import FastsdError
from fastsd.server.styles import Styles


def test_a_file_without_a_column_of_names_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "styles.csv"
    table.write_text("name;prompt;negative_prompt\nink;ink drawing;colour\n")
    with pytest.raises(FastsdError, match="name,prompt,negative_prompt"):
        Styles(str(table))
    table.write_text("")
    assert Styles(str(table)).styles == {}


def test_none_is_no_style_unless_the_file_has_one(tmp_path: Path) -> None:
    assert Styles(None).apply(["None"], "a cat", "fog") == ("a cat", "fog")
    table = tmp_path / "styles.csv"
    table.write_text("name,prompt\nNone,ink\n")
    assert Styles(str(table)).apply(["None"], "a cat", "fog") == ("a cat, ink", "fog")
