"""Hazards: what may change after a component was compiled, and what each way of compiling makes of it.

A hazard is a record (`case.Hazard`): how the model and its call are made ready, what changes then, and how it is
called before and after. `drive` runs it on an architecture eager and in the three ways of `ways`; `judge` compares
with eager; `table` writes the cells into ``docs/safety.md``.
"""
