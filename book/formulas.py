"""Formulas as MathML, which browsers draw without a script."""

from __future__ import annotations

import re

from latex2mathml.converter import convert

# Browsers follow MathML Core, which knows no variants of letters: they are characters of their own.
VARIANT = re.compile(r'<mi mathvariant="(double-struck|script)">([A-Z])</mi>')
FIRST = {"double-struck": 0x1D538, "script": 0x1D49C}
# Letters that Unicode had before those blocks.
OLDER = {
    "double-struck": dict(zip("CHNPQRZ", "ℂℍℕℙℚℝℤ")),
    "script": dict(zip("BEFHILMR", "ℬℰℱℋℐℒℳℛ")),
}


def mathml(latex: str, display: bool) -> str:
    """A formula in LaTeX as MathML, set off as a line of its own with `display`."""

    def letter(match: re.Match[str]) -> str:
        variant, name = match[1], match[2]
        return f"<mi>{OLDER[variant].get(name) or chr(FIRST[variant] + ord(name) - ord('A'))}</mi>"

    return VARIANT.sub(letter, convert(latex.strip(), display="block" if display else "inline"))
