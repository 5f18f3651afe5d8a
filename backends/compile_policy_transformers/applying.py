"""The policy on a Transformers model: regions where the plan says compile, `generate`'s own compile turned off."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from compile_policy.config import CompilationConfig
from compile_policy.configured import region_options
from compile_policy.decorators import ClassPolicy, decorated, use_config
from compile_policy.errors import PolicyWarning
from compile_policy.failure import explained_by
from compile_policy.plan import Component, Plan
from compile_policy.reach import register_reached, trust_folder
from compile_policy.region import Binder, Region, region_of
from compile_policy.saving import ignore_attributes
from compile_policy_transformers import attention, compat
from compile_policy_transformers.audio import SoundBinder
from compile_policy_transformers.canvas import CanvasBinder, reads_a_canvas
from compile_policy_transformers.chains import as_chain, unchain
from compile_policy_transformers.components import meta_model
from compile_policy_transformers.decoder import DecoderBinder
from compile_policy_transformers.forward_parts import parts_of
from compile_policy_transformers.outputs import use_for_outputs
from compile_policy_transformers.planning import make_plan
from compile_policy_transformers.split_decoder import SplitDecoderBinder
from compile_policy_transformers.stack_calls import StackBinder
from compile_policy_transformers.stacks import is_stack
from compile_policy_transformers.vision import EncoderBinder, is_grid_tower

use_for_outputs()
trust_folder(os.path.dirname(__file__))
trust_folder(os.path.dirname(transformers.__file__))  # a checkout or an editable install lies outside site-packages
register_reached(attention.chosen_functions)
explained_by(compat.hook_that_stops)
# Where a checkpoint is from and what its classes are called: two checkpoints of one architecture run the same graph.
ignore_attributes(
    PreTrainedConfig,
    ("_name_or_path", "_commit_hash", "transformers_version", "architectures", "id2label", "label2id"),
)
ignore_attributes(PreTrainedModel, ("name_or_path", *compat.SET_ON_MODELS))
ignore_attributes(torch.nn.Module, ("_is_hf_initialized",))


def apply(model: torch.nn.Module, config: CompilationConfig) -> Plan:
    """Put a region in front of every component that is to be compiled.

    Raises:
        UnsupportedModelError: the configuration asks for something that this model doesn't have.
    """
    plan = make_plan(model, config)
    planned = [_attach(model, component, config) for component in plan.compiled()]
    for module in model.modules():  # instances of a decorated class that turned out to be no component
        region = region_of(module)
        if region is not None and region not in planned and not region.decorated:
            region.detach()
    if planned:
        compat.disable_auto_compile(model)
    return plan


def remove(model: torch.nn.Module) -> None:
    """Give `generate` back its own decision on compiling, and lists of layers their class; regions are the caller's."""
    compat.enable_auto_compile(model)
    unchain(model)


def _attach(model: torch.nn.Module, component: Component, config: CompilationConfig) -> Region:
    module = model.get_submodule(component.qualname)
    if isinstance(module, torch.nn.ModuleList):  # the tower goes through its layers itself
        owner, _, name = component.qualname.rpartition(".")
        module = as_chain(model.get_submodule(owner), name)
    region = region_of(module)
    if region is not None and region.decorated:  # as the user wrote it
        return region
    if region is None:
        region = Region(module, role=component.role, binder=binder_for(component.role, module))
        region.attach()
    region.role, region.qualname, region.reason = component.role, component.qualname, component.reason
    region.name = f"{component.role} {component.qualname}".strip()
    region.options = region_options(config)
    if isinstance(region.binder, DecoderBinder):
        region.binder.belongs_to(model)
    if isinstance(region.binder, StackBinder):
        region.binder.belongs_to(model.get_submodule(component.qualname.rpartition(".")[0]))
    return region


def binder_for(role: str, module: torch.nn.Module) -> Binder:
    """How calls of a component with this role are made canonical."""
    if role == "decoder" and reads_a_canvas(module):
        return CanvasBinder(module)
    if role == "decoder":
        parts = parts_of(module)
        return DecoderBinder(module) if parts is None else SplitDecoderBinder(module, parts)
    if role == "encoder[audio]":
        return SoundBinder(module)
    if isinstance(module, torch.nn.ModuleList) or (is_stack(module) and not is_grid_tower(module)):
        return StackBinder(module)
    return EncoderBinder(module)


@contextmanager
def decorated_for(model_config: PreTrainedConfig, config: CompilationConfig) -> Iterator[None]:
    """Decorate the component classes of a model before it is built; restored on leaving, whatever happens.

    The classes are found on a model without memory. What cannot be planned there is left to `apply`, which sees the
    real model and says what is the matter.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PolicyWarning)  # told once, when the plan of the real model is made
        policies = dict(_policies(model_config, config))
    with decorated(policies), use_config(config):
        yield


def _policies(model_config: PreTrainedConfig, config: CompilationConfig) -> Iterator[tuple[type, ClassPolicy]]:
    model = meta_model(model_config)
    for component in make_plan(model, config).compiled():
        cls = type(model.get_submodule(component.qualname))
        if issubclass(cls, torch.nn.ModuleList):
            continue  # a class of everybody's
        is_encoder = component.role != "decoder"
        role = component.role

        def binder(module: torch.nn.Module, role: str = role) -> Binder:
            return binder_for(role, module)

        yield cls, ClassPolicy(is_encoder=is_encoder, role=role, binder=binder)
