"""What a traced function consists of, and how to compile it in a third of the time."""

import functools

import jax


def is_known(options):
    """Whether the compiler of this JAX has these options."""
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError:
        return False
    return True


FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
OLD_EMITTERS = {"xla_cpu_use_fusion_emitters": False}  # JAX 0.12 has none
if is_known(OLD_EMITTERS):
    FAST |= OLD_EMITTERS
jit = functools.partial(jax.jit, compiler_options=FAST)


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
