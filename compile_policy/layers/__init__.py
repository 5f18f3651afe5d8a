"""Layers that can be replaced, operators that can be switched, and the layers built on them.

Read first: ``registry`` (what is built where a layer is asked for), then ``pluggable`` and ``custom_op``.
"""

from compile_policy.layers.activation import SiluAndMul as SiluAndMul
from compile_policy.layers.custom_op import CustomOp as CustomOp
from compile_policy.layers.custom_op import CustomOps as CustomOps
from compile_policy.layers.custom_op import use_custom_ops as use_custom_ops
from compile_policy.layers.head import ParallelLMHead as ParallelLMHead
from compile_policy.layers.logits import LogitsProcessor as LogitsProcessor
from compile_policy.layers.norm import RMSNorm as RMSNorm
from compile_policy.layers.pluggable import PluggableLayer as PluggableLayer
from compile_policy.layers.pluggable import override as override
from compile_policy.layers.plugins import Plugin as Plugin
from compile_policy.layers.plugins import load_plugins as load_plugins
from compile_policy.layers.records import Claim as Claim
from compile_policy.layers.records import LayerError as LayerError
from compile_policy.layers.records import LayerRecord as LayerRecord
from compile_policy.layers.records import LayerRow as LayerRow
from compile_policy.layers.registry import check_claims as check_claims
from compile_policy.layers.registry import layer_notes as layer_notes
from compile_policy.layers.registry import layer_rows as layer_rows
from compile_policy.layers.registry import registry_scope as registry_scope
from compile_policy.layers.registry import registry_state as registry_state
from compile_policy.layers.replace import Replacements as Replacements
from compile_policy.layers.replace import replace_layers_ as replace_layers_
from compile_policy.layers.rotary import RotaryEmbedding as RotaryEmbedding
from compile_policy.layers.vocab import VocabParallelEmbedding as VocabParallelEmbedding
