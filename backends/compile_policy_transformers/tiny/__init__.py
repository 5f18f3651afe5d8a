"""Tiny random models of any architecture, and inputs that fit them."""

from .inputs import tiny_inputs as tiny_inputs
from .model import known_model_types as known_model_types
from .model import tiny_config as tiny_config
from .model import tiny_model as tiny_model
from .streams import generation_inputs as generation_inputs
