"""Compilation policy for multimodal models: one graph per component, nothing silent.

The public names are imported when they are first used: ``import compile_policy`` loads neither torch nor pydantic.
"""

from typing import TYPE_CHECKING

from compile_policy.lazy_names import lazy_names as _lazy_names

if TYPE_CHECKING:
    from compile_policy import trace as trace
    from compile_policy.applied import apply as apply
    from compile_policy.applied import eager as eager
    from compile_policy.applied import load_model as load_model
    from compile_policy.applied import plan as plan
    from compile_policy.applied import remove as remove
    from compile_policy.applied import report as report
    from compile_policy.config import CompilationConfig as CompilationConfig
    from compile_policy.decorators import ignore_torch_compile as ignore_torch_compile
    from compile_policy.decorators import support_torch_compile as support_torch_compile
    from compile_policy.decorators import use_config as use_config
    from compile_policy.errors import PolicyError as PolicyError
    from compile_policy.errors import PolicyWarning as PolicyWarning
    from compile_policy.shapes import IntermediateTensors as IntermediateTensors

__version__ = "0.1.0"
__all__ = [
    "CompilationConfig",
    "IntermediateTensors",
    "PolicyError",
    "PolicyWarning",
    "apply",
    "eager",
    "ignore_torch_compile",
    "load_model",
    "plan",
    "remove",
    "report",
    "support_torch_compile",
    "trace",
    "use_config",
]

if not TYPE_CHECKING:  # a checker would let any name pass where there is a `__getattr__`
    __getattr__, __dir__ = _lazy_names(
        __name__,
        {
            "trace": "compile_policy.trace",
            "CompilationConfig": "compile_policy.config",
            "PolicyError": "compile_policy.errors",
            "PolicyWarning": "compile_policy.errors",
            "IntermediateTensors": "compile_policy.shapes",
            **dict.fromkeys(("apply", "eager", "load_model", "plan", "remove", "report"), "compile_policy.applied"),
            **dict.fromkeys(
                ("ignore_torch_compile", "support_torch_compile", "use_config"), "compile_policy.decorators"
            ),
        },
        over_modules=("plan",),
        beside={  # a profiler gets names of whatever the policy is applied to
            "compile_policy.applied": "compile_policy.trace",
            "compile_policy.decorators": "compile_policy.trace",
        },
    )
