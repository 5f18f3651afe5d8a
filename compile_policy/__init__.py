"""Compilation policy for multimodal models: one graph per component, nothing silent."""

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
