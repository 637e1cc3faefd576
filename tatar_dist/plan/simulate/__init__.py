"""`tatar-dist plan --simulate`: what a GRPO step costs on hardware one does not have yet.

    measured.py   run directories -> Costs, by non-negative least squares
    costs.py      Costs: seconds per unit of work of every part of a step; read from YAML, or from the two others
    estimate.py   a configuration alone -> Costs, from FLOPs and bytes; never measured, and said so
    step.py       Costs, a split and completion lengths -> the seconds of one step, event by event
    search.py     a configuration and Costs -> the best split learners/engines for each number of GPUs
    tables.py     the result as rich tables
    command.py    the command

Pure Python and numpy: no torch, no Ray.
"""
