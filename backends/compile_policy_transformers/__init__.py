"""The Transformers backend of compile-policy: the only place that imports Transformers."""

from compile_policy_transformers import explaining as explaining
from compile_policy_transformers.applying import apply as apply
from compile_policy_transformers.applying import remove as remove
from compile_policy_transformers.base import find_components as find_components
from compile_policy_transformers.loading import EMBEDDED as EMBEDDED
from compile_policy_transformers.loading import config_of as config_of
from compile_policy_transformers.loading import load_model as load_model
from compile_policy_transformers.loading import load_processor as load_processor
from compile_policy_transformers.loading import plan as plan
from compile_policy_transformers.self_test import self_test as self_test
from compile_policy_transformers.tiny import tiny_inputs as tiny_inputs
from compile_policy_transformers.tiny import tiny_model as tiny_model
