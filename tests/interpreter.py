"""Triton's interpreter, faster: what Triton 3.7's works out at each operation and that is the same each time."""

import dataclasses
import functools
import inspect


def work_out_once() -> None:
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if hasattr(interpreter, "_patch_builtin"):
        list_members_once(interpreter)
    drop_unread_checks(interpreter)
    remember_shapes(interpreter)


def list_members_once(interpreter) -> None:
    """At each call of a function within a kernel it goes through all members of triton.language for what it has to
    replace, and replaces what the kernel's own call did."""
    names, patch, is_builtin = {}, interpreter._patch_lang, interpreter.tl.core.is_builtin

    def replaced(package) -> bool:
        return bool(names.get(package)) and not is_builtin(getattr(package, names[package][0]))

    def replace(package, builder, scope):
        if package not in names:
            names[package] = [name for name, member in inspect.getmembers(package) if is_builtin(member)]
        if not replaced(package):
            for name in names[package]:
                interpreter._patch_attr(package, name, getattr(package, name), builder, scope)

    @functools.cache
    def languages(function) -> list:
        known = interpreter.tl, interpreter.tl.core
        return [value for value in function.__globals__.values() if inspect.ismodule(value) and value in known]

    def replace_all(function):
        seen = languages(function)
        return interpreter._LangPatchScope() if seen and all(map(replaced, seen)) else patch(function)

    interpreter._patch_builtin = replace
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = replace_all


def drop_unread_checks(interpreter) -> None:
    """Each sum and product of integers is done once more, in 64 bits, for an assertion that only debug mode reads."""
    options = interpreter.interpreter_builder.options
    if not options.debug and hasattr(options, "sanitize_overflow"):
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def remember_shapes(interpreter) -> None:
    """All that a type and a tensor say of themselves follows from the shape and the name of what they hold; a name's
    numpy type is looked up in a table that is built for it."""
    block, tensor, numpy_type = interpreter.tl.block_type, interpreter.tl.tensor, interpreter._get_np_dtype
    make_block, make_tensor, blocks, tensors, numpy_types = block.__init__, tensor.__init__, {}, {}, {}

    def init_block(self, element_ty, shape):
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = vars(self).copy()
        vars(self).update(blocks[key], element_ty=element_ty)

    def init_tensor(self, handle, type):
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = vars(self).copy()
        vars(self).update(tensors[type.name], handle=handle, type=type, dtype=type.scalar)

    def get_numpy_type(type):
        if type.name not in numpy_types:
            numpy_types[type.name] = numpy_type(type)
        return numpy_types[type.name]

    block.__init__, tensor.__init__, interpreter._get_np_dtype = init_block, init_tensor, get_numpy_type
