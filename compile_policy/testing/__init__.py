"""For tests of models: is a component one graph, what is in it, and how many graphs did a test need.

The pytest plug-in is ``pytest_compile_policy``; nothing here needs pytest.
"""

from compile_policy.testing.asserting import assert_compiles_once as assert_compiles_once
from compile_policy.testing.asserting import capture as capture
from compile_policy.testing.captured import Captured as Captured
from compile_policy.testing.limits import limited as limited
