"""What a traced function consists of."""
import jax

def equations(jaxpr, enter=lambda eqn: True):
    """All equations of a jaxpr and of the jaxprs inside those equations that are to be entered."""
    for eqn in jaxpr.eqns:
        yield eqn
        inside = list(eqn.params.values()) if enter(eqn) else []
        for value in jax.tree.leaves(inside, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner, enter)
