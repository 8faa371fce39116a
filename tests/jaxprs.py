"""What a traced function consists of."""

import jax


def equations(jaxpr, enter=lambda eqn: True):
    """All equations of a jaxpr and of the jaxprs inside those equations that are to be entered."""
    for eqn in jaxpr.eqns:
        yield eqn
        inside = list(eqn.params.values()) if enter(eqn) else []

        def is_jaxpr(x):
            return hasattr(x, "eqns") or hasattr(x, "jaxpr")

        for value in jax.tree.leaves(inside, is_leaf=is_jaxpr):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner, enter)


def dots(function, *args):
    """The matmuls of a function."""
    found = equations(jax.make_jaxpr(function)(*args).jaxpr)
    return [eqn for eqn in found if eqn.primitive.name == "dot_general"]
