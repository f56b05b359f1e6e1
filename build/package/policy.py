"""The licences that components of netloom may have, and those that its build and test tools may have."""

from __future__ import annotations

import re

CARRIED = {
    # The exception allows distribution, under any terms, of what Nuitka's compilation links into its output.
    "AGPL-3.0-or-later WITH AdditionRef-Nuitka-Runtime-Library-Exception-1.0",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "EPL-2.0",
    "ISC",
    # The exception for the files that a C compiler links into every program: their use implies no restriction.
    "LGPL-2.1-or-later WITH AdditionRef-glibc-start-files-exception",
    "MIT",
    "MIT-0",
    "PSF-2.0",
    "Unicode-3.0",
    "Zlib",
}
TOOLS = CARRIED | {"0BSD", "AGPL-3.0-only", "MPL-2.0"}

# Licence names in older metadata, with their SPDX expressions.
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

# Wheels without a licence in their metadata: the licence according to their licence file.
UNSAID = {"isoduration": "ISC"}


def allows(expression: str, allowed: set[str]) -> bool:
    """Whether the ``allowed`` licences satisfy the SPDX ``expression``. AND binds more tightly than OR."""
    tokens = re.findall(r"[()]|[^\s()]+(?: WITH [^\s()]+)?", SPELT.get(expression, expression))
    verdict = _either(tokens, allowed)
    return verdict and not tokens


def _either(tokens: list[str], allowed: set[str]) -> bool:
    verdict = _all(tokens, allowed)
    while tokens[:1] == ["OR"]:
        tokens.pop(0)
        verdict = _all(tokens, allowed) or verdict
    return verdict


def _all(tokens: list[str], allowed: set[str]) -> bool:
    verdict = _one(tokens, allowed)
    while tokens[:1] == ["AND"]:
        tokens.pop(0)
        verdict = _one(tokens, allowed) and verdict
    return verdict


def _one(tokens: list[str], allowed: set[str]) -> bool:
    if tokens[:1] != ["("]:
        return bool(tokens) and tokens.pop(0) in allowed
    tokens.pop(0)
    verdict = _either(tokens, allowed)
    return tokens[:1] == [")"] and tokens.pop(0) == ")" and verdict
