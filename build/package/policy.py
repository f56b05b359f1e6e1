"""Which licences netloom may carry, and which the tools may have that build and test it."""

from __future__ import annotations

import re

CARRIED = {
    # The exception: what Nuitka's compilation links into its output may be conveyed under any terms.
    "AGPL-3.0-or-later WITH AdditionRef-Nuitka-Runtime-Library-Exception-1.0",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "EPL-2.0",
    "ISC",
    # The exception of the files that a C compiler links into every program: no restriction comes from their use.
    "LGPL-2.1-or-later WITH AdditionRef-glibc-start-files-exception",
    "MIT",
    "MIT-0",
    "PSF-2.0",
    "Unicode-3.0",
    "Zlib",
}
TOOLS = CARRIED | {"0BSD", "AGPL-3.0-only", "MPL-2.0"}

# What stands in older metadata in the place of an SPDX expression.
SPELT = {
    "Apache 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD 2-Clause License": "BSD-2-Clause",
    "GNU Affero General Public License v3": "AGPL-3.0-only",
    "ISC License": "ISC",
    "MIT License": "MIT",
    "MIT license": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "PSFL": "PSF-2.0",
}

# Wheels whose metadata do not tell: what their licence file says.
UNSAID = {"isoduration": "ISC"}


def allows(expression: str, allowed: set[str]) -> bool:
    """Whether somebody who may have only the ``allowed`` licences may have this: AND binds before OR."""
    words = re.findall(r"[()]|[^\s()]+(?: WITH [^\s()]+)?", SPELT.get(expression, expression))
    verdict = _either(words, allowed)
    return verdict and not words


def _either(words: list[str], allowed: set[str]) -> bool:
    verdict = _all(words, allowed)
    while words[:1] == ["OR"]:
        words.pop(0)
        verdict = _all(words, allowed) or verdict
    return verdict


def _all(words: list[str], allowed: set[str]) -> bool:
    verdict = _one(words, allowed)
    while words[:1] == ["AND"]:
        words.pop(0)
        verdict = _one(words, allowed) and verdict
    return verdict


def _one(words: list[str], allowed: set[str]) -> bool:
    if words[:1] != ["("]:
        return bool(words) and words.pop(0) in allowed
    words.pop(0)
    verdict = _either(words, allowed)
    return words[:1] == [")"] and words.pop(0) == ")" and verdict
