import dataclasses
import functools
import importlib
import pkgutil

import slimgrad.methods


@functools.cache
def methods():
    out = {}
    for info in pkgutil.walk_packages(slimgrad.methods.__path__, "slimgrad.methods."):
        mod = importlib.import_module(info.name)
        for v in vars(mod).values():
            if (
                isinstance(v, type)
                and v.__module__ == mod.__name__
                and dataclasses.is_dataclass(v)
                and hasattr(v, "offer")
            ):
                out[info.name.rpartition(".")[2]] = v
    return dict(sorted(out.items()))


def get(name, **f):
    return methods()[name](**f)
