"""Triton's interpreter, faster."""

import inspect


def list_members_once() -> None:
    """At each call of a function within a kernel, Triton 3.7's interpreter goes through all members of triton.language
    for what it has to replace, half of its time: the names are the same each time."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    names, is_builtin = {}, interpreter.tl.core.is_builtin

    def replace(package, builder, scope):
        if package not in names:
            names[package] = [name for name, member in inspect.getmembers(package) if is_builtin(member)]
        if names[package] and is_builtin(getattr(package, names[package][0])):  # else all are replaced already
            for name in names[package]:
                interpreter._patch_attr(package, name, getattr(package, name), builder, scope)

    if hasattr(interpreter, "_patch_builtin"):
        interpreter._patch_builtin = replace
