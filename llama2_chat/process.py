"""A Python process of its own for what could crash, hang or eat memory: a hostile schema, a broken GPU driver."""

from __future__ import annotations

import sys

from llama2_chat import ROOT


def python_command(function: str) -> list[str]:
    """The command line that calls a function of this project, named as "package.module:function".

    Works from a clone that is not installed, in any working directory, in which it looks for no modules (-P).
    """
    module, _, name = function.partition(":")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from {module} import {name}; {name}()"
    return [sys.executable, "-P", "-c", code]
