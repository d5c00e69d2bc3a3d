"""Triton's interpreter at half its cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def patch_language_once() -> None:
    """For every call of a device function the interpreter replaces all of triton.language anew,
    though the kernel's launch has done so: a third of a test's time."""
    patch: Callable[[Any], Any] = interpreter._patch_lang

    def patch_what_is_not(function: Any) -> Any:
        languages = [value for value in function.__globals__.values() if value in (tl, tl.core)]
        if any(tl.core.is_builtin(language.load) for language in languages):
            return patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_what_is_not
